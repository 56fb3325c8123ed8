"""Recipes on ImageNet-1k for ResNets: torchvision's two, and the three of "ResNet strikes back".

`RECIPES` lists them by the names that the files of `configs/` offer.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from halvit_jax.config import default_config
from halvit_jax.recipes.published import top1

NORMS = (r"norm\d?/(scale|bias)$",)


def torchvision_v1(model: str) -> ConfigDict:
    """The 90 epochs of torchvision's V1 weights, whose 76.13 (ResNet-50) is what HaLViT's ResNets are compared with.

    Everything is decayed, norms and biases too. A ResNeXt-101 has 100 epochs in batches of 1024, at a rate of 0.4.
    """
    config = default_config()
    config.num_epochs, config.batch_size = (100, 1024) if "resnext" in model else (90, 256)
    config.recipe_batch_size = config.batch_size
    config.published_top1 = top1(model, "v1")
    config.model.name = model
    config.classification.norm_group = 16 if "resnext" in model else 32  # on 64 GPUs, on 8
    config.data.interpolation = "bilinear"
    config.data.antialias = True
    config.optim.name = "sgd"
    config.optim.learning_rate = 0.1
    config.optim.base_batch_size = 256
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.no_decay = ()
    config.optim.schedule = "step"
    config.optim.warmup_epochs = 0.0
    config.optim.step_epochs = 30.0
    config.optim.step_factor = 0.1
    return config


def torchvision_v2(model: str) -> ConfigDict:
    """The 600 epochs of torchvision's V2 weights, trained on crops of 176 and evaluated on crops of 224 out of 232.

    Norms are not decayed. The published accuracy is that of the EMA: every 32 steps torchvision keeps 0.998908 of its
    average, which is 0.999966 a step.
    """
    config = torchvision_v1(model)
    config.published_top1 = top1(model, "v2")
    config.num_epochs = 600
    config.batch_size = config.recipe_batch_size = 1024
    config.loop.ema_decay = 0.999966
    config.data.train_size = 176
    config.data.eval_crop = 0.965
    config.data.augment = "trivial"
    config.data.repeated_aug = 4
    config.classification.norm_group = config.classification.mix_group = 128
    config.classification.label_smoothing = 0.1
    config.classification.mixup = 0.2
    config.classification.cutmix = 1.0
    config.classification.erase = 0.1
    config.classification.erase_fill = "zero"
    config.optim.learning_rate = 0.5
    config.optim.base_batch_size = 1024
    config.optim.weight_decay = 2e-5
    config.optim.no_decay = NORMS
    config.optim.schedule = "cosine_after_warmup"
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_start = 5e-3
    config.optim.floor = 0.0
    return config


def strikes_back_a2(model: str) -> ConfigDict:
    """A2 of "ResNet strikes back" (Wightman et al., 2021, arXiv 2110.00476): 300 epochs.

    LAMB and binary cross-entropy, whose targets are all classes with more than a fifth of a mixed image; the last norm
    of each block starts at 0. Gradients are clipped to a norm of 1, as timm's LAMB does by itself.
    """
    config = default_config()
    config.num_epochs = 300
    config.batch_size = config.recipe_batch_size = 2048
    config.published_top1 = top1(model, "a2")
    config.model.name = model
    config.model.drop_path = 0.05
    config.model.zero_init_residual = True
    config.data.augment = "rand-m7-mstd0.5-inc1"
    config.data.antialias = True
    config.data.repeated_aug = 3
    config.data.eval_crop = 0.95
    config.classification.loss = "binary_cross_entropy"
    config.classification.bce_threshold = 0.2
    config.classification.norm_group = config.classification.mix_group = 512
    config.classification.mixup = 0.1
    config.classification.cutmix = 1.0
    config.optim.name = "lamb"
    config.optim.learning_rate = 5e-3
    config.optim.base_batch_size = 2048
    config.optim.weight_decay = 0.02
    config.optim.epsilon = 1e-6
    config.optim.clip_norm = 1.0
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_start = 1e-4
    config.optim.floor = 1e-6
    return config


def strikes_back_a1(model: str) -> ConfigDict:
    """A1: 600 epochs, less decay, more Mixup, and smoothed labels, which a threshold would undo."""
    config = strikes_back_a2(model)
    config.published_top1 = top1(model, "a1")
    config.num_epochs = 600
    config.classification.bce_threshold = 0.0
    config.classification.label_smoothing = 0.1
    config.classification.mixup = 0.2
    config.optim.weight_decay = 0.01
    return config


def strikes_back_a3(model: str) -> ConfigDict:
    """A3: 100 epochs on crops of 160, evaluated on crops of 224, without repeated augmentation and stochastic depth."""
    config = strikes_back_a2(model)
    config.published_top1 = top1(model, "a3")
    config.num_epochs = 100
    config.model.drop_path = 0.0
    config.data.train_size = 160
    config.data.augment = "rand-m6-mstd0.5-inc1"
    config.data.repeated_aug = 1
    config.optim.learning_rate = 8e-3
    return config


RECIPES: dict[str, Callable[[str], ConfigDict]] = {
    "v1": torchvision_v1,
    "v2": torchvision_v2,
    "a1": strikes_back_a1,
    "a2": strikes_back_a2,
    "a3": strikes_back_a3,
}
