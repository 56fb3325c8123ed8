"""`report.html` of a finished run: curves, scores, settings and mistakes on one page, for a browser of any width.

The page needs no other file and no network. Its curves are those of the run's event files. Its pictures are made by one
more pass over some images of the evaluation set, for a classification with one label an image.
"""

import base64
import html
import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from halvit_jax import config as config_lib
from halvit_jax import storage
from halvit_jax.experiment.predictions import predictions
from halvit_jax.experiment.trained import load_trained
from halvit_jax.experiment.workdir import PAGE_FILE
from halvit_jax.protocols import DatasetInfo, PyTree
from halvit_jax.storage import Path
from halvit_jax.tasks.classification import Classification

Curve = list[tuple[int, float]]  # steps and values

TILES = 24  # mistakes shown
MAX_CLASSES = 30  # of a confusion matrix that is shown
POINTS = 400  # of a curve, at most: a page of a long run stays small
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 240, 56, 24  # of a chart, and its margins for numbers
COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:16px;max-width:1180px;color:#1f2937}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:1.6em}
table{border-collapse:collapse}td,th{padding:2px 10px 2px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.charts,.tiles{display:flex;flex-wrap:wrap;gap:16px}.charts svg{width:100%;max-width:560px;height:auto}
figure{margin:0;width:150px;font-size:.85em;overflow-wrap:anywhere}figure img{width:100%;image-rendering:pixelated}
.scroll{overflow-x:auto}.matrix td{width:2em;text-align:center;padding:2px 4px}.matrix th{font-weight:normal}
code,pre{background:#f3f4f6;padding:2px 4px;overflow-wrap:anywhere;white-space:pre-wrap}
"""


class Mistake(NamedTuple):
    """An image that was taken for another class than its label."""

    image: np.ndarray  # uint8 [h, w, c]
    name: str  # of its file or record
    label: str
    prediction: str
    probability: float  # of the prediction


class Mistakes(NamedTuple):
    """What a classifier takes for what, on `images` images of a split; the surest mistakes first."""

    confusion: np.ndarray  # [classes, classes]: rows are labels, columns predictions
    worst: list[Mistake]
    images: int


def write_page(workdir: Path, *, config: ConfigDict, info: DatasetInfo, loader: Any, result: Mapping[str, Any]) -> Path:
    """Write the page of a run that has finished with this result, and return its path.

    `loader` is that of the evaluation set. Mistakes are left out of the run of several processes, of a task that is no
    classification with one label an image, and where `config.report_images` is 0.
    """
    mistakes = None
    if config.report_images and jax.process_count() == 1:
        trained = load_trained(workdir)
        label = trained.task.batch_spec().get("label")
        if isinstance(trained.task, Classification) and label is not None and label.shape == ():
            names = info.class_names
            batches = loader.batches(names=True)
            mistakes = find_mistakes(trained.task, trained.model_variables, batches, names, config.report_images)
    path = workdir / PAGE_FILE
    curves = read_curves(workdir)
    storage.write_text(path, page(workdir, config=config, info=info, result=result, curves=curves, mistakes=mistakes))
    return path


def find_mistakes(
    task: Any, variables: PyTree, batches: Iterable[Mapping[str, Any]], names: Sequence[str], images: int
) -> Mistakes:
    """The mistakes on the first `images` images of some batches, which have "image", "label", "name" and "mask".

    `variables` are {"params": ..., **model_state} of the task's model, `names` those of its classes.
    """
    confusion, found = np.zeros((len(names), len(names)), int), []
    for image, name, label, probabilities in itertools.islice(predictions(task, variables, batches), images):
        prediction = int(probabilities.argmax())
        confusion[label, prediction] += 1
        if label != prediction:
            shown = (name, names[label], names[prediction], float(probabilities[prediction]))
            found = sorted([*found, Mistake(image, *shown)], key=lambda mistake: -mistake.probability)[:TILES]
    return Mistakes(confusion, found, int(confusion.sum()))


def read_curves(workdir: Path) -> dict[str, Curve]:
    """{tag: curve} of the event files in a workdir, such as "train/loss"; of a step that ran twice the later value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["tensors"]:
        values = {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}
        if "/" in tag and all(value.shape == () and value.dtype.kind == "f" for value in values.values()):
            curves[tag] = sorted((step, float(value)) for step, value in values.items())
    return curves


def page(
    workdir: Path,
    *,
    config: ConfigDict,
    info: DatasetInfo,
    result: Mapping[str, Any],
    curves: Mapping[str, Curve],
    mistakes: Mistakes | None = None,
) -> str:
    """The page of a run with this config and result, as HTML."""
    folder = shlex.quote(str(workdir))
    commands = [
        f"python -m halvit_jax.predict --workdir={folder} IMAGE...",
        f"python -m halvit_jax.export --workdir={folder} --out=model.safetensors",
        f"python -m halvit_jax.check --workdir={folder} --files_only",
        f"python -m tensorboard.main --logdir={folder}",
    ]
    title = f"{config.model.name} on {info.name or config.data.name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table([(name, shown) for name, shown in _facts(result).items()]),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_charts(curves))}</div>',
        *(_mistakes(mistakes, info.class_names) if mistakes else ()),
        "<h2>Next</h2>",
        *(f"<p><code>{html.escape(command)}</code></p>" for command in commands),
        "<h2>Settings</h2>",
        "<p>Fields that differ from the library's defaults; the others are in <code>config.json</code>.</p>",
        _table([(name, json.dumps(value)) for name, value in _changed_fields(config).items()]),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """The scores and sizes of a result, as text."""
    facts = {}
    for name, score in result.items():
        if isinstance(score, Mapping):
            shown = [f"{key} {'undefined' if value is None else f'{value:.4g}'}" for key, value in score.items()]
            facts[name] = ", ".join(shown)
    facts |= {"parameters": f"{result['params']:,}", "steps": f"{result['step']:,}"}
    if result.get("images_per_s"):
        facts["training speed"] = f"{result['images_per_s']:,.0f} images/s"
    return facts


def _changed_fields(config: ConfigDict) -> dict[str, Any]:
    default = config_lib.flat_fields(config_lib.default_config())
    own = sorted(config_lib.flat_fields(config).items())
    return {name: value for name, value in own if value != default.get(name)}


def _charts(curves: Mapping[str, Curve]) -> list[str]:
    """A chart for each metric, with the curves of training and of all evaluations."""
    metrics: dict[str, dict[str, Curve]] = {}
    for tag, curve in curves.items():
        name, _, metric = tag.rpartition("/")
        metrics.setdefault(metric, {})[name] = curve
    return [_chart(metric, lines) for metric, lines in metrics.items()]


def _chart(title: str, lines: Mapping[str, Curve]) -> str:
    """An SVG of curves over steps, each with its name and last value."""
    points = np.array([point for curve in lines.values() for point in curve if np.isfinite(point[1])])
    if not len(points):
        return ""
    low, high = points.min(0), points.max(0)
    size = np.where(high > low, high - low, 1.0)
    drawn = [f'<text x="0" y="14" font-weight="bold">{html.escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        step, value = low + share * (high - low)
        x, y = LEFT + share * (WIDTH - LEFT), HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 40)
        anchor = "end" if share == 1.0 else "middle" if share else "start"
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{step:,.0f}</text>')
    for number, (name, curve) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        kept = [point for point in curve if np.isfinite(point[1])]
        kept = kept[:: -(-len(kept) // POINTS)] + kept[-1:] if kept else []
        places = (
            (np.array(kept) - low) / size * (WIDTH - LEFT, 40 + BOTTOM - HEIGHT) + (LEFT, HEIGHT - BOTTOM)
            if kept
            else []
        )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = f"{name} {kept[-1][1]:.4g}" if kept else name
        drawn.append(f'<text x="{LEFT + 150 * number}" y="32" fill="{colour}">{html.escape(label)}</text>')
    body = "".join(drawn)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" role="img" aria-label="{html.escape(title)}">{body}</svg>'
    )


def _mistakes(mistakes: Mistakes, names: Sequence[str]) -> list[str]:
    right = int(mistakes.confusion.diagonal().sum())
    parts = [
        "<h2>Mistakes</h2>",
        f"<p>{mistakes.images - right:,} of {mistakes.images:,} images of the evaluation set; the surest first.</p>",
        '<div class="tiles">',
        *(_tile(mistake) for mistake in mistakes.worst),
        "</div>",
    ]
    if len(names) <= MAX_CLASSES:
        parts += [
            "<h2>Confusion matrix</h2><p>Rows are labels, columns predictions.</p>",
            _matrix(mistakes.confusion, names),
        ]
    return parts


def _tile(mistake: Mistake) -> str:
    from halvit_jax import data

    source = base64.b64encode(data.png(mistake.image)).decode()
    text = f"{mistake.label}, taken for {mistake.prediction} ({mistake.probability:.0%})"
    return (
        f'<figure><img alt="{html.escape(mistake.name)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(text)}<br>{html.escape(mistake.name)}</figcaption></figure>"
    )


def _matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"]
    for name, row in zip(names, confusion, strict=True):
        shares = row / max(row.sum(), 1)
        cells = "".join(_cell(share, count) for share, count in zip(shares, row, strict=True))
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="matrix">{"".join(rows)}</table></div>'


def _cell(share: float, count: int) -> str:
    style = f"background:rgba(37,99,168,{share:.2f});color:{'#fff' if share > 0.5 else 'inherit'}"
    return f'<td style="{style}">{count or ""}</td>'


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"
