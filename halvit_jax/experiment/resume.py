"""Differences between the config of a run and that of its resumption."""

from typing import Any

from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax.experiment.workdir import CONFIG_FILE, read_config, saved_steps
from halvit_jax.storage import Path

UNCHANGED_BY = (  # fields and sub-trees that change no parameter of a resumed run, or only where its data lie
    *("loop.log_every", "loop.eval_every", "loop.checkpoint_every", "loop.early_stopping"),
    *("save.", "mesh.", "cluster.", "watchdog.", "compilation_cache", "report_images"),
    *("data.data_dir", "data.root", "data.eval", "data.on_bad_image", "data.bad_image_budget"),
    *("init_", "teacher.init_from", "recipe_batch_size", "published_top1"),
)


def changed_fields(workdir: Path, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{field: (value in the workdir, value of `config`)} of the fields that differ; {} where nothing was trained.

    Raises:
        ValueError: the config of the workdir cannot be read.
    """
    if not saved_steps(workdir) or not (workdir / CONFIG_FILE).is_file():
        return {}
    before, now = (config_lib.flat_fields(each) for each in (read_config(workdir), config))
    pairs = {name: (before.get(name), now.get(name)) for name in before | now}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_changes(workdir: Path, config: ConfigDict, *, allowed: bool) -> list[str]:
    """One line for each field that differs from the config which the workdir was trained with.

    Raises:
        ValueError: a field that makes the resumed run another one, unless that is `allowed`.
    """
    changed = changed_fields(workdir, config)
    breaking = that_change_the_run(changed)
    if breaking and not allowed:
        step = saved_steps(workdir)[-1]
        raise ValueError(
            f"--workdir={workdir} was trained to step {step} with {describe(breaking)}; give the old values, or "
            "another --workdir, or --resume_changed to go on with the new ones"
        )
    return [f"resuming with {name}={now!r}, before {before!r}" for name, (before, now) in changed.items()]


def that_change_the_run(changed: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Those of `changed_fields` without which the resumed run would be the same."""
    return {name: pair for name, pair in changed.items() if not name.startswith(UNCHANGED_BY)}


def describe(changed: dict[str, tuple[Any, Any]]) -> str:
    """The changed fields in one line."""
    return ", ".join(f"{name}={before!r} (now {now!r})" for name, (before, now) in changed.items())
