"""Speed of a detector: whole, by stage, and of the formulations that its operators have.

`python -m halvit_jax.bench --what=detect` calls `measure`. A stage is compiled apart from the others and gets the real
arrays of those before it, so the sum of all is not exactly the time of the whole.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from halvit_jax.analysis import torchvision_benchmark
from halvit_jax.detection import nms, roi_align
from halvit_jax.detection.nms import NMS_IMPLS
from halvit_jax.detection.roi_align import ROI_ALIGN_IMPLS
from halvit_jax.protocols import Array, PyTree

Arrays = dict[str, Any]
Run = Callable[[], None]


class Stage(NamedTuple):
    """A part of a detector: a function of the module and of the arrays by name -> new arrays by name.

    `trained` are the parameters below these names; with any, training also runs it backwards, to them and `through`.
    """

    name: str
    run: Callable[[Any, Arrays], Arrays]
    trained: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    infers: bool = True  # it is a part of inference
    trains: bool = True  # and of training


def _backbone(detector: Any, given: Arrays) -> Arrays:
    return {"raw": detector.backbone.features(given["image"], train=False, frozen_norms=True)}


def _neck(detector: Any, given: Arrays) -> Arrays:
    maps = detector.norms(given["raw"]) if detector.feature_norms else given["raw"]
    return {"maps": detector.pyramid(maps)}


def _rpn(detector: Any, given: Arrays) -> Arrays:
    return dict(zip(("logits", "deltas"), detector._first_stage(given["maps"]), strict=True))


def _proposals(detector: Any, given: Arrays, *, train: bool) -> Arrays:
    maps, canvas = given["maps"], given["image"].shape[1:3]
    kind = "train" if train else "test"
    counts = getattr(detector, f"{kind}_candidates"), getattr(detector, f"{kind}_proposals")
    anchors = detector._grids(maps, canvas)
    found = detector._propose(given["logits"], given["deltas"], anchors, given["size"], *counts)
    return {"proposals" if train else "boxes": found.boxes, f"{kind}_found": found}


def _samples(detector: Any, given: Arrays) -> Arrays:
    """Anchors and proposals matched with the ground truth, and drawn."""
    from halvit_jax.detection.detector import counted, image_keys, shapes
    from halvit_jax.detection.mask_rcnn import _mapped

    maps, truth = given["maps"], given["truth"]
    keys = image_keys(jax.random.key(0), len(truth["size"]))
    anchors = detector._grids(maps, given["image"].shape[1:3])
    made = detector._rpn_losses(given["logits"], given["deltas"], anchors, shapes(maps), truth, keys)
    objects = truth["boxes"], truth["real"], counted(truth)
    boxes, code, *_ = _mapped(detector._match, given["train_found"], *objects, keys)
    return {"sampled": boxes, "code": code, "rpn": made}


def _pool(detector: Any, given: Arrays, *, boxes: str, out: str, bins: int, most: int | None = None) -> Arrays:
    return {out: detector._pool(given["maps"], given[boxes][:, :most], bins)}


def _box_head(detector: Any, given: Arrays, *, pooled: str) -> Arrays:
    return {"answers": detector.box_head(given[pooled])}


def _detections(detector: Any, given: Arrays) -> Arrays:
    boxes = given["boxes"]
    logits, deltas = (a.reshape(*boxes.shape[:2], *a.shape[1:]) for a in given["answers"])
    found = jax.vmap(detector._select)(logits, deltas, given["test_found"], given["size"])
    return {"found": found.boxes, "labels": found.labels}


def _mask_head(detector: Any, given: Arrays, *, pooled: str) -> Arrays:
    return {"drawn": detector.mask_head(given[pooled])}


def _mask_targets(detector: Any, given: Arrays) -> Arrays:
    truth, most = given["truth"], int(detector.roi_samples * detector.roi_positives)
    rows = jnp.maximum(given["code"][:, :most], 0)
    canvas = given["image"].shape[1:3]
    return {"targets": detector._mask_targets(truth, given["sampled"][:, :most], rows, canvas, 28)}


def mask_rcnn_stages(detector: Any) -> list[Stage]:
    """The stages of Mask R-CNN, in order."""
    most, both = int(detector.roi_samples * detector.roi_positives), functools.partial
    train, infer = {"infers": False}, {"trains": False}
    pool = both(_pool, bins=14)
    found = [
        Stage("backbone", _backbone, ("backbone",)),
        Stage("neck", _neck, ("norms", "pyramid"), ("raw",)),
        Stage("RPN head", _rpn, ("rpn",), ("maps",)),
        Stage("proposals", both(_proposals, train=False), **infer),
        Stage("proposals", both(_proposals, train=True), **train),
        Stage("matching, samples, RPN losses", _samples, **train),
        Stage("RoIAlign 7x7", both(_pool, boxes="boxes", out="pooled", bins=7), **infer),
        Stage("RoIAlign 7x7", both(_pool, boxes="sampled", out="train_pooled", bins=7), (), ("maps",), infers=False),
        Stage("box head", both(_box_head, pooled="pooled"), **infer),
        Stage("box head", both(_box_head, pooled="train_pooled"), ("box_head",), ("train_pooled",), infers=False),
        Stage("NMS of detections", _detections, **infer),
    ]
    # The answers of inference are read before those of training take their place.
    found[8:11] = [found[8], found[10], found[9]]
    if detector.masks:
        found += [
            Stage("RoIAlign 14x14", both(pool, boxes="found", out="mask_pooled"), **infer),
            Stage("mask head", both(_mask_head, pooled="mask_pooled"), **infer),
            Stage(
                "RoIAlign 14x14", both(pool, boxes="sampled", out="mask_inputs", most=most), (), ("maps",), infers=False
            ),
            Stage("mask head", both(_mask_head, pooled="mask_inputs"), ("mask_head",), ("mask_inputs",), infers=False),
            Stage("mask targets", _mask_targets, **train),
        ]
    return found


def _head(detector: Any, given: Arrays) -> Arrays:
    return {"rows": [detector.head(level) for _, level in sorted(given["maps"].items())]}


def retinanet_stages(detector: Any) -> list[Stage]:
    """The stages of RetinaNet, in order."""
    return [
        Stage("backbone", _backbone, ("backbone",)),
        Stage("neck", _neck, ("norms", "pyramid"), ("raw",)),
        Stage("head", _head, ("head",), ("maps",)),
    ]


STAGES: dict[str, Callable[[Any], list[Stage]]] = {"MaskRCNN": mask_rcnn_stages, "RetinaNet": retinanet_stages}


def measure(
    name: str, config: ConfigDict, *, subject: Callable[..., Any], against: str | None, repeats: int
) -> list[dict[str, Any]]:
    """Rows by kind: "whole", ours and with `against` torchvision's in turns, then "stage", then "formulation".

    `subject(name, config, likely)` is the detector with variables that `likely` altered, compiled, on a random batch:
    `infer()`, `train()`, `task`, `variables`, `batch`.

    Raises:
        ValueError: torchvision has no such detector, or is not installed.
    """
    config = config.copy_and_resolve_references()
    if config.model.name in torchvision_benchmark.BACKBONES:
        config.model.zero_init_residual = True  # keeps the maps of random weights, without batch statistics, in range
    reference = torchvision_benchmark.TorchvisionMaskRCNN if against else None
    if reference:
        reference.check(config)
    ours = subject(name, config, likely)
    whole: dict[tuple[str, str], Run] = {(name, "infer"): ours.infer, (name, "train"): ours.train}
    if reference:
        theirs = reference(config, ours.task.model, ours.batch)
        whole |= {("torchvision", "infer"): theirs.infer, ("torchvision", "train"): theirs.train}
    times = take_turns(whole, repeats=repeats)
    rows = [
        {"kind": "whole", "model": model, **{f"{what}_ms": times[model, what] for what in ("infer", "train")}}
        for model in dict.fromkeys(model for model, _ in whole)
    ]
    if reference:
        ratios = {f"{what}_ms": round(rows[1][f"{what}_ms"] / rows[0][f"{what}_ms"], 2) for what in ("infer", "train")}
        rows.append({"kind": "whole", "model": "times as fast as torchvision", **ratios})
    found = stages(ours.task, ours.variables, ours.batch, repeats=repeats)
    rows += [{"kind": "stage", **row} for row in found]
    detector, (height, width) = ours.task.model, ours.batch["image"].shape[1:3]
    maps = {stride: (-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)}
    sizes = {"boxes": getattr(detector, "roi_samples", 512), "candidates": getattr(detector, "train_candidates", 2000)}
    found = formulations(maps, channels=detector.width, **sizes, repeats=repeats)
    return rows + [{"kind": "formulation", **row} for row in found]


def likely(variables: PyTree) -> PyTree:
    """Initial variables of a detector, its first class as likely as one in ten, so that there is something to find."""
    params = variables["params"]
    if "box_head" in params:
        bias = params["box_head"]["score"]["bias"]
        score = {**params["box_head"]["score"], "bias": bias.at[0].set(jnp.log(0.1 * (len(bias) - 1)))}
        params = {**params, "box_head": {**params["box_head"], "score": score}}
    return {**variables, "params": params}


def stages(task: Any, variables: PyTree, batch: Mapping[str, Array], *, repeats: int) -> list[dict[str, Any]]:
    """The milliseconds of each stage in inference and in training, there and back: one row each, in order.

    The stages take turns within every round; figures are medians over the rounds, the first of which warms up.
    """
    detector, params = task.model, variables["params"]
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    given: Arrays = {"image": task.normalise(batch["image"]), "size": batch["size"], "truth": dict(batch)}
    runs: dict[tuple[str, str], Run] = {}
    for stage in STAGES[type(detector).__name__](detector):
        own = {name: params[name] for name in stage.trained if name in params}

        def forward(own: PyTree, through: Arrays, given: Arrays, stage: Stage = stage) -> Arrays:
            whole = {"params": {**params, **own}, **rest}
            return detector.apply(whole, {**given, **through}, method=stage.run)

        through = {name: given[name] for name in stage.through}
        one_way = jax.jit(lambda given, own=own, forward=forward: forward(own, {}, given))
        if stage.infers:
            runs[stage.name, "infer"] = functools.partial(_wait, one_way, given)
        if stage.trains:
            if own or through:

                def total(own: PyTree, through: Arrays, given: Arrays, forward: Any = forward) -> jax.Array:
                    made = forward(own, through, given)
                    return sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(made)), jnp.zeros(()))

                both_ways = jax.jit(jax.grad(total, argnums=(0, 1)))
                runs[stage.name, "train"] = functools.partial(_wait, both_ways, own, through, dict(given))
            else:
                runs[stage.name, "train"] = functools.partial(_wait, one_way, dict(given))
        given = {**given, **jax.block_until_ready(one_way(given))}
    times = take_turns(runs, repeats=repeats)
    names = list(dict.fromkeys(name for name, _ in runs))
    return [{"stage": name, **{f"{kind}_ms": times.get((name, kind)) for kind in ("infer", "train")}} for name in names]


def formulations(
    maps: Mapping[int, tuple[int, int]], *, channels: int, boxes: int, candidates: int, repeats: int
) -> list[dict[str, Any]]:
    """The milliseconds of RoIAlign (and its gradient) and of NMS in each formulation, on random maps and boxes.

    `maps`: rows and columns by stride. One image; RoIAlign of `boxes` boxes to 7x7, NMS of `candidates` at IoU 0.7.
    """
    rng = np.random.default_rng(0)
    values = {s: jnp.asarray(rng.standard_normal((*shape, channels)), jnp.float32) for s, shape in maps.items()}
    first = min(maps)
    limits = np.array(maps[first][::-1]) * first

    def random_boxes(count: int) -> Array:
        centre, side = rng.random((count, 2)) * limits, np.exp(rng.uniform(np.log(8), np.log(limits.min()), (count, 2)))
        corners = np.concatenate([centre - side / 2, centre + side / 2], 1)
        return jnp.asarray(np.clip(corners, 0, np.tile(limits, 2)), jnp.float32)

    rois, many = random_boxes(boxes), random_boxes(candidates)
    scores = jnp.asarray(rng.random(candidates), jnp.float32)
    runs: dict[tuple[str, str], Run] = {}
    for name in ROI_ALIGN_IMPLS:
        pool = functools.partial(roi_align, bins=7, formulation=name)
        there = jax.jit(lambda maps, rois, pool=pool: pool(maps, rois))
        back = jax.jit(jax.grad(lambda maps, rois, pool=pool: jnp.sum(pool(maps, rois) ** 2)))
        runs["RoIAlign", name] = functools.partial(_wait, there, values, rois)
        runs["RoIAlign, there and back", name] = functools.partial(_wait, back, values, rois)
    for name in NMS_IMPLS:
        suppress = jax.jit(functools.partial(nms, threshold=0.7, formulation=name, limit=min(1000, candidates)))
        runs["NMS", name] = functools.partial(_wait, suppress, many, scores)
    times = take_turns(runs, repeats=repeats)
    return [{"operator": operator, "formulation": name, "ms": ms} for (operator, name), ms in times.items()]


def take_turns(runs: Mapping[Any, Run], *, repeats: int) -> dict[Any, float]:
    """The median milliseconds of each function over rounds in which all take turns, after a round of warming up."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for round_number in range(repeats + 1):
        for key, run in runs.items():
            gc.collect()
            started = time.perf_counter()
            run()
            if round_number:
                times[key].append(1e3 * (time.perf_counter() - started))
    return {key: round(statistics.median(each), 3) for key, each in times.items()}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `measure` as text, a table for each kind."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return "\n\n".join(
        _table([{name: value for name, value in row.items() if name != "kind"} for row in rows if row["kind"] == kind])
        for kind in kinds
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [list(rows[0])] + [["" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _wait(function: Callable[..., Any], *given: Any) -> None:
    jax.block_until_ready(function(*given))
