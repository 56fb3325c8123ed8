"""The console script: `halvit train --config=halvit_tiny --workdir=...` is `python -m halvit_jax.main ...`."""

import importlib.metadata
import runpy
import sys

from halvit_jax.protocols import ExitCode

# Sub-command -> (module, arguments that it adds, what it does).
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "train": ("halvit_jax.main", [], "train a model, or resume its run"),
    "eval": ("halvit_jax.main", ["--mode=eval"], "evaluate a trained model"),
    "predict": ("halvit_jax.predict", [], "classify images"),
    "export": ("halvit_jax.export", [], "write a model for use elsewhere"),
    "halve": ("halvit_jax.halve", [], "make a HaLViT of a trained ViT"),
    "convert": ("halvit_jax.convert", [], "convert weights between PyTorch's names and ours"),
    "summary": ("halvit_jax.summary", [], "models, counts and published accuracies"),
    "check": ("halvit_jax.check", [], "check a config, its data and a workdir"),
    "plan": ("halvit_jax.plan", [], "memory and speed of a step on a TPU, without one"),
    "bench": ("halvit_jax.bench", [], "measure speed"),
    "doctor": ("halvit_jax.cli.doctor", [], "installed versions, devices, data sets and extras"),
}


def run(argv: list[str] | None = None) -> None:
    """Run a sub-command in this process."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"halvit_jax {version()}")
        return
    if not arguments or arguments[0] in ("-h", "--help", "--helpfull"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        print(f"error: {arguments[0]!r} is not one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    module, added, _ = COMMANDS[arguments[0]]
    sys.argv = [f"halvit {arguments[0]}", *added, *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


def usage() -> str:
    """The help of the script."""
    lines = [f"  {name:<8} {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(["halvit COMMAND [flags]; halvit COMMAND --help lists the flags", "", *lines])


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("halvit_jax")
