"""Backbones as detectors call them."""

import jax

from halvit_jax.models.resnet import ResNet


class FrozenNormResNet(ResNet):
    """ResNet whose norms may stay in evaluation mode; it has no stochastic depth here."""

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        return super().features(images, train=train and not frozen_norms)


def resnet18() -> ResNet:
    return FrozenNormResNet(depths=(2, 2, 2, 2), stages=("basic",) * 4, num_classes=0)
