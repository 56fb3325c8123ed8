"""Every model in one table: parameters, multiply-accumulates, image size, what it saves, and what was published.

python -m halvit_jax.summary [--json] [NAME...]

"deployed" is the model as it serves, with its batch normalisations and sums folded (`models.fold`). "saved" compares it
with its host, the known model that it does the same work as with less: both deployed, so folding alone saves nothing.
"""

import functools
import json
from typing import Any, NamedTuple

import jax
from absl import flags
from flax import linen as nn

from halvit_jax.analysis.macs import count_macs
from halvit_jax.cli import app
from halvit_jax.layers import conv
from halvit_jax.models import MODELS, create_model, list_models

# Model -> its host; that of one whose name ends in HC is the model without it.
HOSTS = {
    "halvit_tiny": "deit_small",
    "halvit_small": "deit_base",
    "halvit_tiny_h": "deit_small",
    "halvit_small_h": "deit_base",
    "halvit_resnet50": "resnet50",
    "halvit_resnext101_32x8d": "resnext101_32x8d",
    "mini_halvit_tiny": "deit_small",
    "mini_halvit_small": "deit_base",
    "mini_deit_tiny": "deit_tiny",
    "mini_deit_small": "deit_small",
    "mini_deit_base": "deit_base",
    "mini_swin_tiny": "swin_tiny",
    "mini_swin_small": "swin_small",
    "mini_swin_base": "swin_base",
}
HC = "_hc"
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
    "of its host",
    "published (not measured here)",
)

# Top-1 on ImageNet-1k and how it was trained, by the papers or torchvision; None of these was measured here.
# `params` where the paper's own figure differs from ours, as it was printed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "halvit_tiny": {"params": "11.1M", "top1": 77.3, "source": "HaLViT, T, 300 epochs"},
    "halvit_small": {"params": "43.0M", "top1": 81.3, "source": "HaLViT, M, 300 epochs"},
    "halvit_resnet50": {"params": "13.4M", "top1": 75.1, "source": "HaLViT; counted without the classifier"},
    "deit_tiny": {"top1": 72.2, "source": "DeiT, 300 epochs"},
    "deit_small": {"top1": 79.9, "source": "DeiT, 300 epochs"},
    "deit_base": {"top1": 81.8, "source": "DeiT, 300 epochs"},
    "deit_tiny_distilled": {"top1": 74.5, "source": "DeiT, 300 epochs"},
    "deit_small_distilled": {"top1": 81.2, "source": "DeiT, 300 epochs"},
    "deit_base_distilled": {"top1": 83.4, "source": "DeiT, 300 epochs"},
    "mini_deit_tiny": {"top1": 73.0, "source": "MiniViT, 300 epochs, distilled"},
    "mini_deit_small": {"top1": 80.9, "source": "MiniViT, 300 epochs, distilled"},
    "mini_deit_base": {"top1": 83.2, "source": "MiniViT, 300 epochs, distilled"},
    "mini_swin_tiny": {"top1": 81.3, "source": "MiniViT, 300 epochs, distilled"},
    "mini_swin_small": {"top1": 83.9, "source": "MiniViT, 300 epochs, distilled"},
    "mini_swin_base": {"top1": 84.5, "source": "MiniViT, 300 epochs, distilled"},
    "swin_tiny": {"top1": 81.3, "source": "Swin Transformer, 300 epochs"},
    "swin_small": {"top1": 83.0, "source": "Swin Transformer, 300 epochs"},
    "swin_base": {"top1": 83.5, "source": "Swin Transformer, 300 epochs"},
    "pvt_tiny": {"top1": 75.1, "source": "PVT, 300 epochs"},
    "pvt_small": {"top1": 79.8, "source": "PVT, 300 epochs"},
    "pvt_medium": {"top1": 81.2, "source": "PVT, 300 epochs"},
    "pvt_large": {"top1": 81.7, "source": "PVT, 300 epochs"},
    "pvt_v2_b0": {"top1": 70.5, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b1": {"top1": 78.7, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b2": {"top1": 82.0, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b2_li": {"top1": 82.1, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b3": {"top1": 83.1, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b4": {"top1": 83.6, "source": "PVTv2, 300 epochs"},
    "pvt_v2_b5": {"top1": 83.8, "source": "PVTv2, 300 epochs"},
    "regnety_160": {"top1": 82.9, "source": "as DeiT's teacher; 83.0 at a crop of 0.95"},
    "resnet18": {"top1": 69.76, "source": "torchvision V1, 90 epochs"},
    "resnet50": {"top1": 76.13, "source": "torchvision V1, 90 epochs"},
    "resnext101_32x8d": {"top1": 79.3, "source": "torchvision V1"},
    "nextvit_small": {"top1": 82.5, "source": "Next-ViT, 300 epochs"},
    "nextvit_base": {"top1": 83.2, "source": "Next-ViT, 300 epochs"},
    "nextvit_large": {"top1": 83.6, "source": "Next-ViT, 300 epochs"},
    "shvit_s1": {"top1": 72.8, "source": "SHViT, 300 epochs"},
    "shvit_s2": {"top1": 75.2, "source": "SHViT, 300 epochs"},
    "shvit_s3": {"top1": 77.4, "source": "SHViT, 300 epochs"},
    "shvit_s4": {"top1": 79.4, "source": "SHViT, 300 epochs"},
    "shvit_s1_distilled": {"top1": 74.0, "source": "SHViT, 300 epochs"},
    "shvit_s2_distilled": {"top1": 76.2, "source": "SHViT, 300 epochs"},
    "shvit_s3_distilled": {"top1": 78.3, "source": "SHViT, 300 epochs"},
    "shvit_s4_distilled": {"top1": 80.2, "source": "SHViT, 300 epochs"},
}


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_bool("json", False, "One JSON object a line instead of a table.")


class Counts(NamedTuple):
    """Exact counts of a model at its own image size."""

    params: int
    head: int  # of them
    macs: int


def host_of(name: str) -> str | None:
    """The model that `name` is to be compared with, if there is one."""
    host = name.removesuffix(HC) if name.endswith(HC) else HOSTS.get(name)
    return host if host in MODELS else None


def summarise(name: str) -> dict[str, Any]:
    """Exact counts of one model at its own image size, nothing computed: {"model", "params", "gmacs", ...}.

    "params_saved" and "gmacs_saved" are in percent of the host's, None without one.
    """
    model, host = create_model(name), host_of(name)
    own, deployed = counts_of(model), counts_of(_deployed(model))
    saved = _saved(deployed, counts_of(_deployed(create_model(host)))) if host else (None, None)
    return {
        "model": name,
        "params": own.params,
        "params_without_head": own.params - own.head,
        "gmacs": round(own.macs / 1e9, 3),
        "params_deployed": deployed.params,
        "params_deployed_without_head": deployed.params - deployed.head,
        "gmacs_deployed": round(deployed.macs / 1e9, 3),
        "image_size": model.image_size,
        "host": host,
        "params_saved": saved[0],
        "gmacs_saved": saved[1],
        "published": PUBLISHED.get(name),
    }


@functools.cache
def counts_of(model: nn.Module) -> Counts:
    """What a model counts as it is built; nothing is computed."""
    params = _shapes(model)["params"]
    heads = [tree for name, tree in params.items() if name.startswith("head")]
    with conv.xla_convolutions():
        macs = count_macs(lambda v, x: model.apply(v, x, train=False), _shapes(model), _image(model))
    return Counts(_size(params), _size(heads), macs)


def _deployed(model: nn.Module) -> nn.Module:
    """The model that `models.fold` makes of it."""
    return model.clone(folded=True) if "batch_stats" in _shapes(model) else model


@functools.cache
def _shapes(model: nn.Module) -> Any:
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), _image(model))


def _image(model: nn.Module) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _saved(ours: Counts, host: Counts) -> tuple[float, float]:
    """Parameters and multiply-accumulates, in percent of the host's."""
    shares = (1 - ours.params / host.params, 1 - ours.macs / host.macs)
    return tuple(round(100 * share, 1) + 0.0 for share in shares)  # + 0.0: -0.0 is 0.0


def main(argv: list[str]) -> None:
    """Print the table of the named models, or of all."""
    with app.bad_input():
        rows = [summarise(name) for name in argv[1:] or list_models()]
    if flags.FLAGS.json:
        for row in rows:
            print(json.dumps(row))
        return
    columns = "{:<26} {:>12} {:>13} {:>8} {:>12} {:>8} {:>6} {:>7} {:>7}  {:<17} {}"
    print(columns.format(*HEADINGS).rstrip())
    for row in rows:
        counts = f"{row['params']:,}", f"{row['params_without_head']:,}", f"{row['gmacs']:.3f}"
        deployed = f"{row['params_deployed']:,}", f"{row['gmacs_deployed']:.3f}"
        saved = [f"{row[key]:.1f} %" if row["host"] else "" for key in ("params_saved", "gmacs_saved")]
        published = _published(row["published"])
        line = columns.format(row["model"], *counts, *deployed, row["image_size"], *saved, row["host"] or "", published)
        print(line.rstrip())


def _published(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    params = f"{figures['params']}, " if "params" in figures else ""
    return f"{params}top-1 {figures['top1']} ({figures['source']})"


if __name__ == "__main__":
    define_flags()
    app.run(main)
