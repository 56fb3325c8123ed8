"""Every model in one table: parameters, multiply-accumulates, image size, savings, and published results.

python -m halvit_jax.summary [--json | --markdown] [NAME...]

"deployed" is the model at inference, with its batch normalisations and sums folded (`models.fold`). "saved" compares it
with its baseline, the known model that it is derived from, deployed too. --markdown prints the tables of
docs/models.md.
"""

import json
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from halvit_jax.analysis.counts import summarize
from halvit_jax.cli import app, config_files
from halvit_jax.models import FAMILIES, list_models

HEADINGS = (
    "model",
    "parameters",
    "without head",
    "GMACs",
    "deployed",
    "GMACs",
    "image",
    "saved",
    "GMACs",
    "of its baseline",
    "published (not measured here)",
)
MARKDOWN_HEADINGS = ("model", "parameters", "deployed", "GMACs", "image", "saved", "published top-1", "config")


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_bool("json", False, "One JSON object a line instead of a table.")
    flags.DEFINE_bool("markdown", False, "One Markdown table a family instead of a table.")


def main(argv: list[str]) -> None:
    """Print the table of the named models, or of all."""
    given = flags.FLAGS
    with app.report_user_errors():
        if given.json and given.markdown:
            raise ValueError("--json and --markdown: give one of them")
        rows = {name: summarize(name) for name in argv[1:] or list_models()}
    if given.json:
        print("\n".join(json.dumps(row) for row in rows.values()))
    else:
        print(markdown(rows) if given.markdown else table(rows.values()))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows of `summarize` as text."""
    columns = "{:<26} {:>12} {:>13} {:>8} {:>12} {:>8} {:>6} {:>7} {:>7}  {:<17} {}"
    lines = [columns.format(*HEADINGS)]
    for row in rows:
        counts = f"{row['params']:,}", f"{row['params_without_head']:,}", f"{row['gmacs']:.3f}"
        deployed = f"{row['params_deployed']:,}", f"{row['gmacs_deployed']:.3f}"
        saved = [f"{row[key]:.1f} %" if row["baseline"] else "" for key in ("params_saved", "gmacs_saved")]
        baseline, published = row["baseline"] or "", _published(row["published"])
        lines.append(columns.format(row["model"], *counts, *deployed, row["image_size"], *saved, baseline, published))
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Mapping[str, dict[str, Any]]) -> str:
    """The rows of `summarize`, {model: row}, as a Markdown table for each family."""
    tables, configs = [], configs_by_model()
    for family in FAMILIES:
        chosen = [rows[name] for name in family.sizes if name in rows]
        if not chosen:
            continue
        lines = [
            f"### {family.model.__name__}",
            "",
            _cells(MARKDOWN_HEADINGS),
            _cells(["---"] * len(MARKDOWN_HEADINGS)),
        ]
        for row in chosen:
            saved = ""
            if row["baseline"]:
                saved = f"{row['params_saved']:.1f} %, {row['gmacs_saved']:.1f} % of `{row['baseline']}`"
            deployed = f"{row['params_deployed']:,}" if row["params_deployed"] != row["params"] else "the same"
            counts = f"{row['params']:,}", deployed, f"{row['gmacs_deployed']:.3f}", str(row["image_size"])
            config = f"`{configs[row['model']]}`" if row["model"] in configs else ""
            lines.append(_cells([f"`{row['model']}`", *counts, saved, _published(row["published"]), config]))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def configs_by_model() -> dict[str, str]:
    """{model: its ImageNet config}, as `--config=` takes it; a file's default comes before variants."""
    found: dict[str, tuple[bool, str]] = {}
    for name, path in config_files.FILES.items():
        module = runpy.run_path(str(path))
        for variant in ("", *(name for group in module.get("VARIANTS", ()) for name in group if name)):
            config = module["get_config"](*[variant] if variant else [])
            if config.data.name == "imagenet2012":
                entry = bool(variant), f"configs/{name}.py{variant and ':'}{variant}"
                found[config.model.name] = min(found.get(config.model.name, entry), entry, key=lambda each: each[0])
    return {name: entry for name, (_, entry) in found.items()}


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _published(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    params = f"{figures['params']}, " if "params" in figures else ""
    return f"{params}top-1 {figures['top1']} ({figures['source']})"


if __name__ == "__main__":
    define_flags()
    app.run(main)
