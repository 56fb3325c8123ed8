"""Feed-forward layers of a transformer block: dense, compact and tied.

Shapes: `b` batch, `n` tokens, `d` width, `f` hidden, `r` rank. Every class of FFN maps [b, n, d] -> [b, n, d] and takes
the same fields, so a block chooses one by name. Tokens may lie on a map, [b, u, v, d].
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from halvit_jax.layers import batch_norm
from halvit_jax.layers.arrays import align_last, widen
from halvit_jax.layers.fused_ffn import FFN_IMPLS, choose_ffn
from halvit_jax.layers.initializers import Dtype, Initializer, normal_02
from halvit_jax.layers.placement import current
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
    ffn_impl: str = "auto"  # one of CHOICES, see `implementation`
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        chosen = implementation(self, x, tied=False, obstacle=self._obstacle())
        if chosen != "xla":
            return without_hidden(chosen, x, *self._parts(), dtype=self.dtype)
        h = nn.Dense(self.hidden, kernel_init=normal_02, dtype=self.dtype, name="expand")(x)
        return CompactDense(self.width, self.compact, dtype=self.dtype, name="reduce")(self.activation(h), train=train)

    def _obstacle(self) -> str:
        """The reason why the hidden activations must exist, or ""."""
        if self.compact.rank != 1.0:
            return "its second matrix is a product of two (model.ffn_rank)"
        return "" if self.activation is gelu else "its activation is not GELU"

    def _parts(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """The kernels and the biases of both layers."""
        layers = [self.variables["params"][name] for name in ("expand", "reduce")]
        return [layer["kernel"] for layer in layers], [layer["bias"] for layer in layers]


class TiedMlp(nn.Module):
    """W^T gelu(W x + b1) + b2, with one matrix (HaLViT); `compact` is not used."""

    width: int  # d
    hidden: int  # f
    compact: Compact = Compact()
    ffn_impl: str = "auto"  # as in Mlp
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train
        tied = TiedDense(self.width, self.hidden, dtype=self.dtype, name="tied")
        b1 = self.param("hidden_bias", nn.initializers.zeros, (self.hidden,))
        b2 = self.param("bias", nn.initializers.zeros, (self.width,))
        chosen = implementation(self, x, tied=True)
        if chosen != "xla":
            return without_hidden(chosen, x, [tied.cast_kernel()], [b1, b2], dtype=self.dtype)
        h = tied.project(x)
        y = tied.project_back(gelu(h + align_last(b1.astype(h.dtype), h)))
        return y + align_last(b2.astype(y.dtype), y)


FFN: dict[str, type[nn.Module]] = {"dense": Mlp, "tied": TiedMlp}


def implementation(module: nn.Module, x: jax.Array, *, tied: bool, obstacle: str = "") -> str:
    """What computes the layer: "xla", or a key of FFN_IMPLS, which keeps the hidden activations out of memory.

    `module.ffn_impl`, one of CHOICES, selects it ("auto": fused where the platform, the type and the shapes allow it);
    `obstacle` is the reason why the hidden activations must exist, or "".

    Raises:
        ValueError: "fused" is required and not possible.
    """
    if module.is_initializing():
        return "xla"
    return choose_ffn(
        module.ffn_impl,
        place=current(),
        dtype=jnp.dtype(module.dtype or x.dtype),
        shape=_rows(x.shape),
        hidden=module.hidden,
        tied=tied,
        needs_hidden=obstacle,
    )


def without_hidden(
    chosen: str, x: jax.Array, kernels: Sequence[jax.Array], biases: Sequence[jax.Array], *, dtype: Dtype
) -> jax.Array:
    """The layer [b, ..., d] -> [b, ..., d] through FFN_IMPLS[chosen], with one kernel or two."""
    x, *weights = promote_dtype(x, *kernels, dtype=dtype)
    return FFN_IMPLS[chosen](x.reshape(_rows(x.shape)), tuple(weights), tuple(biases)).reshape(x.shape)


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


def _rows(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of tokens in a row: [b, ..., d] -> [b, n, d]."""
    return shape[0], math.prod(shape[1:-1]), shape[-1]
