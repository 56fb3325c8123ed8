"""Backbones as detectors call them."""

import jax
from flax import linen as nn

from halvit_jax.layers.conv import ConvNorm
from halvit_jax.models.resnet import ResNet


class FrozenNormResNet(ResNet):
    """ResNet whose norms may stay in evaluation mode; it has no stochastic depth here."""

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        return super().features(images, train=train and not frozen_norms)


def resnet18() -> ResNet:
    return FrozenNormResNet(depths=(2, 2, 2, 2), stages=("basic",) * 4, num_classes=0)


class TinyBackbone(nn.Module):
    """A convolution a stage."""

    dtype: str | None = None

    @nn.compact
    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        maps, x = {}, images.astype(self.dtype)
        for i, stride in enumerate((4, 8, 16, 32)):
            conv = ConvNorm(8 * (i + 1), 3, 4 if i == 0 else 2, dtype=self.dtype, name=f"stage{i}")
            x = maps[stride] = nn.relu(conv(x, train=train and not frozen_norms))
        return maps
