"""The tied kernel: one matrix W used as `x @ W` and as `h @ W.T`.

Onur Can Koyun, Behçet Uğur Töreyin, "HaLViT: Half of the Weights are Enough", CVPR Workshops 2024, pages 3669-3678,
https://doi.org/10.1109/CVPRW63382.2024.00370.

HaLViT halves a layer pair: both directions read the same array. `TiedDense` declares it once, so parameters, gradients,
optimizer moments, EMA, checkpoints and shardings hold it once. To share it further (among the blocks of a ResNet
stage), pass the submodule. The tempting wrong version declares two kernels and copies one to the other:

    up, down = nn.Dense(f, name="up"), nn.Dense(d, name="down")                    # wrong: two kernels
    params["down"]["kernel"] = params["up"]["kernel"].T                            # equal until the first update

The tree, counts and checkpoints then hold both. Each has its own gradient and its own optimizer moments, so they differ
after one step. Copying after every step drops half of the gradient, because that of W is the sum over both uses.

Shapes: `d` width, `f` hidden.
"""

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from halvit_jax.layers.initializers import Dtype, Initializer


class TiedDense(nn.Module):
    """One kernel W of shape (d, f), applied forwards and backwards.

    A 1x1 convolution is the same product with the channels last, so both ViTs and HaLViT-ResNets use this class. The
    initial W is Xavier-normal, as in the authors' ResNet, which treats both directions alike. With the 0.02 of the ViT
    family a narrow tied model learns slower than the untied one.
    """

    in_features: int  # d
    features: int  # f
    kernel_init: Initializer = nn.initializers.xavier_normal()
    dtype: Dtype = None

    def setup(self) -> None:
        kernel = self.param("kernel", self.kernel_init, (self.in_features, self.features))
        # Cast once for both uses, so their gradients are added before the all-reduce, not after.
        self._cast = kernel if self.dtype is None else kernel.astype(self.dtype)

    def cast_kernel(self) -> jax.Array:
        """W in the type that both uses compute in, [d, f]."""
        return self._cast

    def project(self, x: jax.Array, *, first: int | None = None) -> jax.Array:
        """x @ W: [..., d] -> [..., f], or only the `first` columns of it."""
        x, kernel = promote_dtype(x, self._cast, dtype=self.dtype)
        return x @ (kernel if first in (None, self.features) else kernel[:, :first])

    def project_back(self, h: jax.Array) -> jax.Array:
        """h @ W.T: [..., f] -> [..., d]."""
        h, kernel = promote_dtype(h, self._cast, dtype=self.dtype)
        return h @ kernel.T
