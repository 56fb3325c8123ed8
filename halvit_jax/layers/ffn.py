"""Feed-forward layers of a transformer block: dense, compact and tied.

Shapes: `b` batch, `n` tokens, `d` width, `f` hidden, `r` rank. Every class of FFN maps [b, n, d] -> [b, n, d] and takes
the same fields, so a block chooses one by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from halvit_jax.layers import batch_norm
from halvit_jax.layers.arrays import align_last, widen
from halvit_jax.layers.initializers import Dtype, Initializer, normal_02
from halvit_jax.layers.tied import TiedDense


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x) = x (1 + erf(x / sqrt 2)) / 2, computed in float32 at least, as PyTorch does.

    Flax's default is the tanh approximation, with an error of up to 5e-4. Its exact form uses erfc, which takes twice
    as long on a CPU.
    """
    wide = widen(x)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Compact:
    """The factors of a feed-forward layer's second matrix: see `CompactDense`."""

    rank: float = 1.0  # r / d, to the nearest whole r; 1: one dense matrix
    branches: int = 2  # number of products whose sum is a factor in training
    folded: bool = False  # for inference alone, with the variables of `fold`


class CompactDense(nn.Module):
    """B A x + b, two matrices of rank r instead of one: [..., f] -> [..., d].

        in training       y = sum_i norm_i(B_i z),  z = sum_i norm_i(A_i x)      i = 1 ... branches
        after `fold`      y = B (A x) + b                                        r (f + d) + d parameters

    The hidden-to-output projection of the compact FFN (Xu et al., 2023, arXiv 2306.10875). The paper states that this
    matrix is factorised and that re-parameterisation strengthens it; its code is not released. Our reading: r = d / 2;
    nothing between A: f -> r and B: r -> d; two branches, each a matrix without bias and a batch normalisation over
    batch and tokens; b = B a + c, where the norms add a to z and c to y. It saves parameters if r < f d / (f + d), four
    fifths of d for f = 4 d. With rank 1 it is a dense layer.

    In training the norms of B remove the biases of the norms of A, which therefore get no gradient and stay constant.

    Raises ValueError if it is folded and in training.
    """

    features: int  # d
    compact: Compact = Compact()
    kernel_init: Initializer = normal_02
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        common = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        rank = max(1, round(self.features * self.compact.rank))
        if self.compact.rank == 1.0:
            shape = x.shape[-1], self.features
            kernel = self.param("kernel", self.kernel_init, shape)
            bias = self.param("bias", nn.initializers.zeros, shape[1:])
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            y = x @ kernel
            return y + align_last(bias, y)
        if self.compact.folded:
            if train:
                raise ValueError(f"{self.name} is folded and cannot be trained; train the model before `fold`")
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
        return batch_norm.BatchNorm(dtype=self.dtype, name="norm")(dense(x), train=train)


class Mlp(nn.Module):
    """W2 gelu(W1 x + b1) + b2, with two matrices; W2 h + b2 may be compact, see `CompactDense`."""

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
    """W^T gelu(W x + b1) + b2, with one matrix (HaLViT); `compact` is not used."""

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
        y = tied.project_back(gelu(h + align_last(b1.astype(h.dtype), h)))
        return y + align_last(b2.astype(y.dtype), y)


FFN: dict[str, type[nn.Module]] = {"dense": Mlp, "tied": TiedMlp}


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`layers.batch_norm.fold`, and the sums of the branches of every compact layer.

    With its norm folded a branch is A_i x + a_i or B_i z + c_i. So A = sum A_i, B = sum B_i, b = B sum a_i + sum c_i.
    """
    params = batch_norm.fold(variables)["params"]
    _merge(params)
    return {"params": params}


def _merge(params: dict[str, Any]) -> None:
    """Replace the branches of every compact layer by `first` and `second`, A and B."""
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
