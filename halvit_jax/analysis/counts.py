"""Parameters and multiply-accumulates of the models, from shapes only."""

import functools
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from halvit_jax.analysis.macs import count_macs
from halvit_jax.experiment.tasks import build_task
from halvit_jax.layers import conv
from halvit_jax.models import baseline_of, create_model, family_of
from halvit_jax.recipes import detection
from halvit_jax.recipes.detection import DETECTORS
from halvit_jax.trees import count, variable_shapes


class Counts(NamedTuple):
    """Exact counts of a model at its own image size."""

    params: int
    head: int  # of them
    macs: int


def summarize(name: str) -> dict[str, Any]:
    """Counts of one model, as it is trained and with its batch normalisations folded: {"model", "params", ...}.

    "params_saved" and "gmacs_saved" are in percent of the baseline's, both folded; None without a baseline. A detector
    has "params", and "backbone", "params_backbone".
    """
    for detector in DETECTORS:
        if name.startswith(f"{detector}_"):
            return _summarize_detector(detector, name.removeprefix(f"{detector}_"))
    model, baseline = create_model(name), baseline_of(name)
    trained, deployed = counts_of(model), counts_of(_folded(model))
    saved = _saved(deployed, counts_of(_folded(create_model(baseline)))) if baseline else (None, None)
    published = family_of(name).published.get(name)
    return {
        "model": name,
        "params": trained.params,
        "params_without_head": trained.params - trained.head,
        "gmacs": round(trained.macs / 1e9, 3),
        "params_deployed": deployed.params,
        "params_deployed_without_head": deployed.params - deployed.head,
        "gmacs_deployed": round(deployed.macs / 1e9, 3),
        "image_size": model.image_size,
        "baseline": baseline,
        "params_saved": saved[0],
        "gmacs_saved": saved[1],
        "published": published and {key: value for key, value in published._asdict().items() if value},
    }


def list_detectors() -> list[str]:
    """The detectors that recipes train: mask_rcnn_<backbone> and retinanet_<backbone>."""
    return [f"{detector}_{backbone}" for detector, backbones in DETECTORS.items() for backbone in backbones]


def _summarize_detector(detector: str, backbone: str) -> dict[str, Any]:
    """Counts of a detector with COCO's classes, its backbone and the norms on its maps taken together."""
    config = detection.coco(detector, backbone)
    params, _ = jax.eval_shape(build_task(config).init, jax.random.key(0))
    of_backbone = count(params["backbone"]) + count(params.get("norms", {}))
    name = f"{detector}_{backbone}"
    return {"model": name, "params": count(params), "backbone": backbone, "params_backbone": of_backbone}


@functools.cache
def counts_of(model: nn.Module) -> Counts:
    """Parameter and MAC counts of a model as it is built; nothing is computed."""
    variables = variable_shapes(model)
    heads = [tree for name, tree in variables["params"].items() if name.startswith("head")]
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, model.in_channels), "float32")
    with conv.xla_convolutions():
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), variables, images)
    return Counts(count(variables["params"]), count(heads), macs)


def _folded(model: nn.Module) -> nn.Module:
    """The model after `models.fold`."""
    return model.clone(folded=True) if "batch_stats" in variable_shapes(model) else model


def _saved(ours: Counts, baseline: Counts) -> tuple[float, float]:
    """Parameters and multiply-accumulates saved, in percent of the baseline's."""
    ratios = (ours.params / baseline.params, ours.macs / baseline.macs)
    return tuple(round(100 * (1 - ratio), 1) + 0.0 for ratio in ratios)  # + 0.0: -0.0 is 0.0
