"""Train or evaluate: flags -> config -> devices -> loop; nothing else.

python -m halvit_jax.main --config=configs/halvit_digits.py --workdir=runs/halvit_digits [--mode=train|eval]
"""

import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from halvit_jax import config as config_lib
from halvit_jax import door


def define_flags() -> None:
    """The flags of this door."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; override with --config.some.field=value.")
    flags.DEFINE_string("workdir", None, "Where checkpoints, curves and results of the run are kept.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train to the end, or evaluate the newest checkpoint.")


def main(argv: list[str]) -> None:
    """Work on the parsed flags."""
    with door.bad_input():
        if argv[1:]:
            raise ValueError(f"unexpected arguments {argv[1:]}; flags look like --config.batch_size=64")
        if flags.FLAGS.config is None or flags.FLAGS.workdir is None:
            raise ValueError("give both --config=configs/NAME.py and --workdir=DIR")
    work(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir), mode=flags.FLAGS.mode)


def work(config: ConfigDict, workdir: pathlib.Path, *, mode: str = "train") -> dict[str, Any]:
    """Train to the end, or evaluate the newest checkpoint; print the result and return it.

    Bad input ends the program with one line and exit code 2, before anything is compiled.
    """
    with door.bad_input():
        config_lib.validate(config)
        from halvit_jax import run as run_lib

        run = run_lib.build(config)
        run_lib.create_workdir(workdir)

        # Orbax and CLU take seconds to import, so what is wrong with the config has been said by now.
        from halvit_jax.training import loop
        from halvit_jax.training.checkpoint import Checkpointer
        from halvit_jax.training.report import Report

        checkpointer = Checkpointer(workdir, keep=config.keep_checkpoints)
        if mode == "eval" and checkpointer.latest_step is None:
            raise ValueError(f"--workdir={workdir} has no checkpoint to evaluate; train first, with --mode=train")
        report = Report(workdir, total_steps=run.total_steps, batch_size=config.batch_size)
        state = loop.begin(
            run.task, run.optimizer, checkpointer, report, mesh=run.mesh, seed=config.seed, ema_decay=config.ema_decay
        )

    with door.bad_data():
        if mode == "eval":
            result = loop.evaluate_state(run.task, state, run.eval_loader, mesh=run.mesh, report=report)
        else:
            for line in run_lib.departures(config):
                report.say(f"WARNING: {line}")
            run_lib.write_description(workdir, config, run.class_names)
            report.hyperparameters(config.to_dict())
            result = loop.train(
                run.task,
                run.optimizer,
                state,
                run.train_loader,
                run.eval_loader,
                mesh=run.mesh,
                checkpointer=checkpointer,
                report=report,
                seed=config.seed,
                total_steps=run.total_steps,
                accumulate=config.accumulate,
                log_every=config.log_every,
                eval_every=config.eval_every,
                checkpoint_every=config.checkpoint_every,
                ema_decay=config.ema_decay,
            )
    checkpointer.close()
    report.close()
    if mode == "eval":
        report.say(json.dumps(result))
    else:
        run_lib.write_result(workdir, result)
        report.result(result, workdir)
    return result


if __name__ == "__main__":
    define_flags()
    door.run(main)
