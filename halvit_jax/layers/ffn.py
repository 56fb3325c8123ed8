"""Feed-forward layers of a transformer block: dense, compact and tied.

Shapes: `b` batch, `n` tokens, `d` width, `f` hidden, `r` rank. Every class of FFN maps [b, n, d] -> [b, n, d] and is
built from width, hidden and dtype, so that a block chooses one by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from halvit_jax.layers import conv
from halvit_jax.layers.init import Dtype, Initializer, normal_02
from halvit_jax.layers.tied import TiedDense


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x) = x (1 + erf(x / sqrt 2)) / 2, computed in float32 at least, as PyTorch does.

    Flax's default is the tanh approximation, off by up to 5e-4; its exact form is written with erfc, which on a CPU
    takes twice as long.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Compact:
    """How the second matrix of a feed-forward layer is written: see `CompactDense`."""

    rank: float = 1.0  # r / d; 1: one dense matrix
    branches: int = 2  # in training each factor is a sum of that many products
    folded: bool = False  # for inference alone, with the variables of `fold`


class CompactDense(nn.Module):
    """B A x + b, two matrices of rank r in the place of one: [..., f] -> [..., d].

    The hidden-to-output projection of the compact FFN (Xu et al., 2023, arXiv 2306.10875). What we know of the paper
    says that it is factorised and strengthened by re-parameterisation, not how. Our reading: r = d / 2; nothing between
    A: f -> r and B: r -> d; in training each is a sum of branches, a product without bias and its batch normalisation
    each. `fold` makes one product of each sum, and of all that is added the bias b. With rank 1 it is a dense layer.
    """

    features: int  # d
    compact: Compact = Compact()
    kernel_init: Initializer = normal_02
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        rank, common = round(self.features * self.compact.rank), {"kernel_init": self.kernel_init, "dtype": self.dtype}
        if rank == self.features:
            shape = x.shape[-1], self.features
            kernel = self.param("kernel", self.kernel_init, shape)
            bias = self.param("bias", nn.initializers.zeros, shape[1:])
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            return x @ kernel + bias
        if self.compact.folded:
            x = nn.Dense(rank, use_bias=False, **common, name="first")(x)
            return nn.Dense(self.features, **common, name="second")(x)
        for name, features in (("first", rank), ("second", self.features)):
            branches = [DenseNorm(features, **common, name=f"{name}{i}") for i in range(self.compact.branches)]
            x = sum(branch(x, train=train) for branch in branches)
        return x


class DenseNorm(nn.Module):
    """A matrix without bias and its batch normalisation, over all axes but the last: [..., c] -> [..., features]."""

    features: int
    kernel_init: Initializer = normal_02
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        dense = nn.Dense(self.features, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="dense")
        return conv.BatchNorm(dtype=self.dtype, name="norm")(dense(x), train=train)


class Mlp(nn.Module):
    """W2 gelu(W1 x + b1) + b2, with two matrices, of which the second may be compact."""

    width: int  # d
    hidden: int  # f
    compact: Compact = Compact()
    activation: Callable[[jax.Array], jax.Array] = gelu
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        h = nn.Dense(self.hidden, kernel_init=normal_02, dtype=self.dtype, name="expand")(x)
        return CompactDense(self.width, self.compact, dtype=self.dtype, name="reduce")(self.activation(h), train=train)


class TiedMlp(nn.Module):
    """W^T gelu(W x + b1) + b2, with one matrix (HaLViT), which has no factors: `compact` is not used."""

    width: int  # d
    hidden: int  # f
    compact: Compact = Compact()
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train
        tied = TiedDense(self.width, self.hidden, dtype=self.dtype, name="tied")
        b1 = self.param("hidden_bias", nn.initializers.zeros, (self.hidden,))
        b2 = self.param("bias", nn.initializers.zeros, (self.width,))
        h = tied.project(x)
        y = tied.project_back(gelu(h + b1.astype(h.dtype)))
        return y + b2.astype(y.dtype)


FFN: dict[str, type[nn.Module]] = {"dense": Mlp, "tied": TiedMlp}


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model for inference: what `layers.conv.fold` folds, and every compact layer's sums.

    A branch is W_i x + b_i once its norm is folded, so A = sum A_i, B = sum B_i and b = B sum a_i + sum b_i.
    """
    params = conv.fold(variables)["params"]
    _merge(params)
    return {"params": params}


def _merge(params: dict[str, Any]) -> None:
    """Put `first` and `second` in the place of a compact layer's branches, wherever there are some."""
    for module in params.values():
        if not isinstance(module, dict):
            continue
        if "first0" in module:
            first, second = _sum(module, "first"), _sum(module, "second")
            second["bias"] = first.pop("bias") @ second["kernel"] + second["bias"]
            module.clear()
            module.update(first=first, second=second)
        else:
            _merge(module)


def _sum(module: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    """The sum of the branches of a factor."""
    found = [branch["dense"] for key, branch in module.items() if key.startswith(name)]
    return {part: np.sum([branch[part] for branch in found], axis=0) for part in ("kernel", "bias")}
