"""What the apparatus costs: the real step and loop's bookkeeping against the same without it, at digits scale.

python tests/faults/overhead.py [--rounds=9]

With: finite flags in the step, the wish stamped on each batch and read back, the watchdog told of every phase, and the
digests and manifest of a checkpoint every 550 steps. Without: a step that returns its sums. Both run in turns, on the
same batches; figures are medians of the rounds.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np

from halvit_jax.recipes import digits
from halvit_jax.run import build_task
from halvit_jax.training import health, manifest
from halvit_jax.training.digests import digests
from halvit_jax.training.loop import check
from halvit_jax.training.optim import make_optimizer
from halvit_jax.training.sharding import make_mesh, to_devices
from halvit_jax.training.signals import Signals
from halvit_jax.training.state import abstract_state, init_state
from halvit_jax.training.step import make_train_step
from halvit_jax.training.watchdog import Watchdog

STEPS = 60  # of a round


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    config = digits("halvit_tiny")
    task, mesh = build_task(config), make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(**config.optim, batch_size=128, steps_per_epoch=11, total_steps=2200)
    abstract = abstract_state(task, optimizer, mesh=mesh, use_ema=True)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (128, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 10, 128, np.int32),
        "mask": np.ones(128, bool),
    }
    flags = health.flags
    steps, states = {}, {}
    for name in ("with", "without"):
        health.flags = flags if name == "with" else lambda parts: flags({"loss": parts["loss"]})
        step = make_train_step(task, optimizer, seed=0, ema_decay=config.ema_decay)
        states[name] = init_state(task, optimizer, abstract, seed=0, use_ema=True)
        steps[name] = step.lower(states[name], {}, to_devices(batch | ({} if name == "without" else _wish()), mesh))
        steps[name] = steps[name].compile()
    signals, watchdog = Signals(), Watchdog(pathlib.Path(tempfile.mkdtemp()), timeout=600.0, compile_timeout=600.0)
    watchdog.start()

    def with_it(state: Any) -> Any:
        before = None
        for number in range(STEPS):
            watchdog.at("waiting for data", number)
            rows = to_devices(signals.stamp(batch), mesh)
            watchdog.at("training", number)
            state, outcome = steps["with"](state, {}, rows)
            if before is not None:
                check(before, number, health.NO_LIMIT)
                int(before.wish)
            before = outcome
        return jax.block_until_ready(state)

    def without_it(state: Any) -> Any:
        before = None
        for _ in range(STEPS):
            state, outcome = steps["without"](state, {}, to_devices(batch, mesh))
            jax.block_until_ready(before)  # two steps under way, here too
            before = outcome.sums
        return jax.block_until_ready(state)

    ways = {"with": with_it, "without": without_it}
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for round_number in range(rounds + 1):
        for name in ways if round_number % 2 else reversed(ways):
            began = time.perf_counter()
            states[name] = ways[name](states[name])
            if round_number:  # the first only warms up
                seconds[name].append((time.perf_counter() - began) / STEPS)
    watchdog.stop()
    folder = pathlib.Path(tempfile.mkdtemp()) / "1"
    folder.mkdir()
    (folder / "arrays").write_bytes(b"\0" * sum(x.nbytes for x in jax.tree.leaves(states["with"])))
    verified = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        digests(states["with"])
        manifest.write(folder, 1)
        verified.append(time.perf_counter() - began)
    step, plain = (statistics.median(seconds[name]) for name in ("with", "without"))
    seal = statistics.median(verified[1:])
    print(f"step with {1e3 * step:.2f} ms, without {1e3 * plain:.2f} ms; digests and manifest {1e3 * seal:.1f} ms")
    print(f"overhead {(step + seal / config.checkpoint_every) / plain - 1:+.2%}")


def _wish() -> dict[str, np.ndarray]:
    return {name: rows for name, rows in Signals().stamp({"mask": np.ones(128, bool)}).items() if name != "mask"}


if __name__ == "__main__":
    main()
