"""What the guards of a run cost: flags, watchdog, requests of signals, digests of checkpoints.

python tests/faults/overhead.py --data_dir=DIR [--rounds=20] [--steps=50]

The digits run takes turns with the same steps without any of it: value and gradient, optimizer, averages. Figures are
medians over the rounds; the last line adds the digests of a save, as often as the config saves.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()

    import jax
    import optax

    from halvit_jax.experiment import build
    from halvit_jax.recipes import digits
    from halvit_jax.training.checkpoint.digests import digests
    from halvit_jax.training.fault_tolerance.preemption import PreemptionHandler
    from halvit_jax.training.fault_tolerance.watchdog import TRAINING, Watchdog
    from halvit_jax.training.loop import CHECK_STATE_EVERY, check
    from halvit_jax.training.sharding import to_devices
    from halvit_jax.training.state import TrainState
    from halvit_jax.training.step import add_state_flags, make_train_step

    config = digits.vit("halvit_tiny")
    config.data.data_dir = given.data_dir
    run = build.build(config)
    task, optimizer, decay = run.task, run.optimizer, config.loop.ema_decay
    guarded = make_train_step(task, optimizer, seed=0, ema_decay=decay, guard=run.guard)

    def bare(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), state.step)

        def loss_of(params: dict) -> tuple:
            loss = task.loss(params, state.model_state, task.constants, batch, key)
            return loss.value, (loss.model_state, loss.sums)

        (_, (model_state, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state)
        return new.replace(ema=optax.incremental_update(new.trained, state.ema, 1.0 - decay)), sums

    bare = jax.jit(bare, donate_argnums=0)
    preemption = PreemptionHandler()
    watchdog = Watchdog(pathlib.Path(tempfile.mkdtemp()), timeout=600.0, compile_timeout=600.0)
    watchdog.start()

    def with_guards(state: TrainState, rows: list) -> TrainState:
        before = None
        for step, each in enumerate(rows):
            watchdog.heartbeat("waiting for data", step)
            batch = to_devices(preemption.attach_request(each), run.mesh)
            watchdog.heartbeat(TRAINING, step)
            state, outcome = guarded(state, task.constants, batch)
            if step % CHECK_STATE_EVERY == 0:
                outcome = add_state_flags(state, outcome)
            if before is not None:
                check(before, step, run.guard)
                int(before.request)
            before = outcome
        return jax.block_until_ready(state)

    def without(state: TrainState, rows: list) -> TrainState:
        before = None
        for each in rows:
            state, sums = bare(state, to_devices(each, run.mesh))
            jax.block_until_ready(before)  # as many steps under way as with guards
            before = sums
        return jax.block_until_ready(state)

    batches = run.loaders.train.batches(0)
    rows = [next(batches) for _ in range(given.steps)]
    states = [run.fresh_state(run.abstract_state()) for _ in range(2)]
    loops: list[Callable] = [with_guards, without]
    times: list[list[float]] = [[], []]
    for round_number in range(given.rounds + 1):
        for i in (0, 1) if round_number % 2 else (1, 0):
            started = time.perf_counter()
            states[i] = loops[i](states[i], rows)
            if round_number:  # the first one compiles
                times[i].append((time.perf_counter() - started) / given.steps)
    watchdog.stop()
    digests(states[0])
    saves = []
    for _ in range(given.rounds):
        started = time.perf_counter()
        digests(states[0])
        saves.append(time.perf_counter() - started)
    step, plain, save = (statistics.median(each) for each in (*times, saves))
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    print(f"a step: {1e3 * step:.2f} ms with guards, {1e3 * plain:.2f} ms without, median of ratios {ratio:.4f}")
    share = save / config.loop.checkpoint_every / plain
    print(f"digests of a save: {1e3 * save:.1f} ms, every {config.loop.checkpoint_every} steps: {share:.3%} of a step")


if __name__ == "__main__":
    main()
