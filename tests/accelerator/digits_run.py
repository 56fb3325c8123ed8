"""A small run of the project's own loop on scikit-learn's digits: no TensorFlow, no CLU, no config. It may kill itself.

python digits_run.py WORKDIR [--kill]      with --kill it ends by SIGKILL at step 15, the checkpoint of 10 written
"""

import json
import os
import pathlib
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

STEPS, SAVE_EVERY, KILLED_AT, BATCH, SEED = 20, 10, 15, 64, 0
FIELDS = {"image_size": 32, "patch_size": 4, "width": 64, "depth": 2, "num_heads": 2, "num_classes": 10}


def stand_in_for_clu() -> None:
    """Where CLU cannot be imported, curves go nowhere."""
    try:
        import clu.metric_writers  # noqa: F401
    except ImportError:

        class Nowhere:
            def __init__(self, *args: Any) -> None: ...

            def __getattr__(self, name: str) -> Any:
                return lambda *args, **keywords: ""

        package = types.ModuleType("clu")
        package.metric_writers = types.SimpleNamespace(AsyncWriter=Nowhere, SummaryWriter=Nowhere, MultiWriter=Nowhere)
        package.parameter_overview = types.SimpleNamespace(get_parameter_overview=lambda *args, **keywords: "")
        sys.modules["clu"] = package


class Digits:
    """A `Loader` in memory: images of 32x32, their order a function of seed and epoch; `last` counts as evaluation."""

    def __init__(self, *, train: bool, killing: pathlib.Path | None = None) -> None:
        data = load_digits()
        images = np.kron(data.images * 15, np.ones((4, 4))).astype(np.uint8)  # [n, 32, 32]
        part = slice(None, 1500) if train else slice(1500, None)
        self._images, self._labels = images[part, :, :, None].repeat(3, -1), data.target[part].astype(np.int32)
        self.num_examples = len(self._labels)
        self.steps_per_epoch = self.num_examples // BATCH
        self._train, self._killing = train, killing

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        if not self._train:
            for first in range(0, self.num_examples, BATCH):
                yield self._rows(np.arange(first, min(first + BATCH, self.num_examples)))
            return
        step = start_step
        while True:
            epoch, place = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([SEED, epoch]).permutation(self.num_examples)
            if step == KILLED_AT and self._killing and start_step == 0:
                self._die()
            yield self._rows(order[place * BATCH : (place + 1) * BATCH])
            step += 1

    def _rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        missing = BATCH - len(rows)
        images = np.pad(self._images[rows], ((0, missing), (0, 0), (0, 0), (0, 0)))
        return {
            "image": images,
            "label": np.pad(self._labels[rows], (0, missing)),
            "mask": np.arange(BATCH) < len(rows),
        }

    def _die(self) -> None:
        for _ in range(300):
            if (self._killing / "checkpoints" / str(SAVE_EVERY)).exists():
                break
            time.sleep(0.1)
        print(f"SIGKILL at step {KILLED_AT}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def main(workdir: pathlib.Path, *, kill: bool) -> None:
    stand_in_for_clu()
    from ours import make_task, one_device, optimizer_of

    from halvit_jax.training import loop
    from halvit_jax.training.checkpoint.checkpointer import Checkpointer
    from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
    from halvit_jax.training.fault_tolerance.watchdog import Watchdog
    from halvit_jax.training.report import Report
    from halvit_jax.training.state import abstract_state, init_state

    workdir.mkdir(parents=True, exist_ok=True)
    task = make_task("halvit_tiny", **FIELDS, drop_path=0.1, dtype=jnp.bfloat16)
    loader = Digits(train=True, killing=workdir if kill else None)
    lengths = {"batch_size": BATCH, "steps_per_epoch": loader.steps_per_epoch, "total_steps": STEPS}
    optimizer = optimizer_of(**lengths, warmup_epochs=0.0, learning_rate=1e-3, scaling="none")
    mesh = one_device()
    report = Report(workdir, total_steps=STEPS, batch_size=BATCH)
    checkpointer = Checkpointer(workdir, log=report.log)
    start = loop.restore_or_init(
        checkpointer,
        report,
        abstract_state(task, optimizer, mesh=mesh, use_ema=False),
        lambda abstract: init_state(task, optimizer, abstract, seed=SEED, use_ema=False),
        eval_every=STEPS,
    )
    result = loop.train(
        task,
        optimizer,
        start,
        loader,
        {"eval": Digits(train=False)},
        mesh=mesh,
        checkpointer=checkpointer,
        report=report,
        preemption=PreemptionHandler(),
        watchdog=Watchdog(workdir, timeout=600.0, compile_timeout=600.0),
        debug_folder=workdir / "debug",
        seed=SEED,
        total_steps=STEPS,
        log_every=5,
        eval_every=STEPS,
        checkpoint_every=SAVE_EVERY,
        ema_decay=0.0,
    )
    checkpointer.close()
    (workdir / "trial.json").write_text(json.dumps(result | {"began_at": int(start.state.step)}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), kill="--kill" in sys.argv[2:])
