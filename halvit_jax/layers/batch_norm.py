"""Batch normalisation, and its folding for inference.

Shapes: `b` batch, `c` channels.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from halvit_jax.layers.arrays import align_last, widen
from halvit_jax.layers.initializers import Dtype, Initializer

EPSILON = 1e-5  # of every batch normalisation


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's bookkeeping: [..., c] -> [..., c].

    Statistics are float32 also in bfloat16 computation. Training normalises with the biased variance of the global
    batch and moves the averages in `batch_stats` towards its mean and *unbiased* variance, as PyTorch does. Evaluation
    normalises with the averages. `momentum` is the weight of the old average.

    With `groups` (see `norm_groups`) each of as many equal parts of the batch is normalised with its own statistics,
    and the averages move towards the mean over the parts of their means and unbiased variances.
    """

    momentum: float = 0.9
    epsilon: float = EPSILON
    scale_init: Initializer = nn.initializers.ones
    dtype: Dtype = None
    folded: str = ""  # see `fold`: "merged" into the convolution before it, or "affine": only a scale and a bias

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, groups: int = 1) -> jax.Array:
        if self.folded and train:
            raise ValueError(f"{self.name} is folded and cannot be trained; train the model before `fold`")
        if self.folded == "merged":
            return x
        features = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        if self.folded:
            x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
            return x * align_last(scale, x) + align_last(bias, x)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)

        wide = widen(x)
        if train:
            apart = groups > 1
            wide = wide.reshape(groups, -1, *x.shape[1:]) if apart else wide
            axes, count = tuple(range(apart, wide.ndim - 1)), x.size // x.shape[-1] // groups
            mean = wide.mean(axes, keepdims=apart)
            # The mean of squares minus the squared mean would lose digits. The variance is minimal at the mean, so its
            # gradient with respect to the mean is zero.
            var = jnp.square(wide - align_last(lax.stop_gradient(mean), wide)).mean(axes, keepdims=apart)
            if not self.is_initializing():
                move = functools.partial(_moving_average, self.momentum)
                for running, new in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
                    running.value = move(running.value, new.mean(0).reshape(features) if apart else new)
        else:
            mean, var = running_mean.value, running_var.value
        # One multiply and one add per element, here and in the gradient.
        factor = align_last(scale, var) * lax.rsqrt(var + self.epsilon)
        y = wide * align_last(factor, wide) + align_last(align_last(bias, mean) - mean * factor, wide)
        return y.reshape(x.shape).astype(self.dtype or x.dtype)


@contextlib.contextmanager
def norms_in_evaluation(active: bool) -> Iterator[None]:
    """Within it, if `active`, batch normalisations use their averages and do not update them, also in training.

    For detectors: with few images a batch, the statistics of a pretrained backbone are better than the batch's.
    """

    def evaluate(
        call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            kwargs = kwargs | {"train": False}
        return call(*args, **kwargs)

    with nn.intercept_methods(evaluate) if active else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def norm_groups(count: int) -> Iterator[None]:
    """Within it, batch normalisations in training cut the batch into this many groups with statistics of their own.

    PyTorch's normalise the images of one GPU, and the noise of few images is part of the recipe. The averages are the
    mean over the groups, which `DistributedDataParallel` would have too if it did not keep those of its first process:
    as it expects them, with less noise, and whatever number of devices there is.
    """

    def cut(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            kwargs = kwargs | {"groups": count}
        return call(*args, **kwargs)

    with nn.intercept_methods(cut) if count > 1 else contextlib.nullcontext():
        yield


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model with folded batch normalisations: the outputs of evaluation in fewer steps.

    A normalisation multiplies by g = scale / sqrt(var + EPSILON) and adds bias - mean g. After a convolution (`conv1`
    and `norm1`, `conv` and `norm`, `shortcut/conv` and `shortcut_norm`) or a matrix (`dense` and `norm`), g is merged
    into the kernel and the rest into the bias. Elsewhere a scale and a bias replace the normalisation.
    """
    params = jax.tree.map(np.asarray, dict(variables["params"]))
    stats = jax.tree.map(np.asarray, dict(variables.get("batch_stats", {})))
    for *folders, name in sorted(_norms(stats)):
        parent, found = params, stats
        for folder in folders:
            parent, found = parent[folder], found[folder]
        norm, moved = parent[name], found[name]
        scale = norm["scale"] / np.sqrt(moved["var"] + EPSILON)
        bias = norm["bias"] - moved["mean"] * scale
        before = parent.get(name.removesuffix("_norm"), {}).get("conv") if name.endswith("_norm") else None
        before = before or parent.get(name.replace("norm", "conv")) or parent.get(name.replace("norm", "dense"))
        if before is None:
            parent[name] = {"scale": scale, "bias": bias}
        else:
            before["bias"] = before.get("bias", np.float32(0)) * scale + bias
            before["kernel"] = before["kernel"] * scale
            del parent[name]
    return {"params": params}


def _norms(stats: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all normalisations."""
    if "mean" in stats:
        return [path]
    return [found for name, below in stats.items() for found in _norms(below, (*path, name))]


def _moving_average(momentum: float, old: jax.Array, new: jax.Array) -> jax.Array:
    return momentum * old + (1 - momentum) * lax.stop_gradient(new)
