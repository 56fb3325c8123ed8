"""Halve a trained ViT: its HaLViT, tied layer by layer to what the teacher computes, in minutes and without labels.

python -m halvit_jax.halve --config=configs/NAME.py --out=FILE.safetensors [--teacher=RUN|FILE] [--images=2048]
    [--fit_steps=1500] [--rounds=25] [--covariance=data|identity]

The config's model is the student, of the teacher's shape: attention, feed-forward layers or both tied. The teacher is
--teacher or `config.teacher.init_from`: a workdir, a weight file, or a PyTorch state whose model
`--config.teacher.name` names. The images are the first of `config.data`.

The file is one for `--config.init_from`, `halvit_jax.load`, `predict --workdir` and `export --workdir`. One line for
each block: the relative squared errors of its layers' outputs (1 is as good as a constant), of attention for averaged
matrices and after the least squares, of the feed-forward layer before and after the fit. Stopped by a signal, it saves
what is done, and the same command goes on.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from halvit_jax.cli import app

# Nothing imports this module: the package's function has its name.


def define_flags() -> None:
    """Define the command-line flags."""
    config_flags.DEFINE_config_file("config", None, "File of configs/; its model is the student.")
    flags.DEFINE_string("teacher", "", "A workdir or a weight file; else config.teacher.init_from.")
    flags.DEFINE_string("out", None, "The .safetensors file to write.")
    flags.DEFINE_integer("images", 2048, "Calibration images.", lower_bound=1)
    flags.DEFINE_integer("fit_steps", 1500, "Steps of each feed-forward layer's fit.", lower_bound=0)
    flags.DEFINE_integer("rounds", 25, "Rounds of the least squares, at most.", lower_bound=0)
    flags.DEFINE_enum("covariance", "data", ["data", "identity"], "What weights the least squares.")


def main(argv: list[str]) -> None:
    """Halve, and print the errors and accuracies."""
    given = flags.FLAGS
    with app.report_user_errors():
        app.reject_positional_args(argv, "flags look like --teacher=runs/vit_digits")
        if given.config is None or given.out is None:
            raise ValueError("give both --config=configs/NAME.py and --out=FILE.safetensors")
        out = pathlib.Path(given.out)
        if out.exists():
            raise ValueError(f"--out={out} exists; name another one, or remove it")
        if out.suffix != ".safetensors":
            raise ValueError(f"--out={out} must end in .safetensors")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out={out} is in a folder that does not exist; create {out.absolute().parent}")
        from halvit_jax.experiment import halve  # slow: imports the trainer

        settings = {"fit_steps": given.fit_steps, "rounds": given.rounds, "covariance": given.covariance}
        job = halve.prepare(given.config, source=given.teacher, images=given.images, **settings)
        result = halve.run(job, out, log=lambda text: print(text, flush=True))
    if "stopped" in result:
        app.stopped(f"{result['stopped']}: the same command goes on from there")
    print(json.dumps({name: value for name, value in result.items() if name != "blocks"}))


if __name__ == "__main__":
    define_flags()
    app.run(main)
