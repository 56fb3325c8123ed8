"""Recipes for the 1,797 digits that ship inside scikit-learn: minutes on two cores."""

from ml_collections import ConfigDict

from halvit_jax.config import default_config


def vit(model: str) -> ConfigDict:
    """A ViT of width 96 and depth 4 on patches of 2x2 pixels; about two minutes on two cores."""
    config = _digits(model)
    config.model.patch_size = 2
    config.model.width = 96
    config.model.depth = 4
    config.model.num_heads = 3
    config.model.drop_path = 0.1
    return config


def shvit() -> ConfigDict:
    """A small SHViT in some minutes; the stem keeps the 8x8 map, and the stages have 8x8, 4x4 and 2x2."""
    config = _digits("shvit_s1")
    config.total_steps = 600
    config.loop.log_every = 50
    config.loop.eval_every = config.loop.checkpoint_every = 200
    config.model.depths = (1, 2, 2)
    config.model.widths = (32, 64, 96)
    config.model.partial_dims = (16, 16, 24)
    config.model.stem_strides = (1, 1)
    config.optim.warmup_epochs = 5.0
    return config


def nextvit(model: str) -> ConfigDict:
    """A small Next-ViT: a map of 8x8, then 4x4 tokens with a fourth as many pooled keys."""
    config = _digits(model)
    config.total_steps = 400
    config.loop.log_every = 50
    config.loop.ema_decay = 0.0  # as on ImageNet; an EMA of so few steps lags far behind
    config.loop.eval_every = config.loop.checkpoint_every = 200
    config.model.depths = (1, 2)
    config.model.widths = (32, 48)
    config.model.periods = (0, 2)
    config.model.reductions = (1, 2)
    config.model.stem_widths = (32, 32)
    config.model.stem_strides = (1, 1)
    config.model.head_width = 8
    config.model.drop_path = 0.1
    config.optim.warmup_epochs = 5.0
    return config


def swin(model: str) -> ConfigDict:
    """A Swin of two stages, on maps of 8x8 and 4x4 tokens with windows of 4x4."""
    config = vit(model)
    config.model.depth = config.model.num_heads = None
    config.model.patch_size = 1
    config.model.width = 48
    config.model.depths = (2, 2)
    config.model.head_width = 16
    config.model.window_size = 4
    config.optim.no_decay = (*config.optim.no_decay, r"position_bias/table$")
    return config


def mini_swin(model: str) -> ConfigDict:
    """The same for a Mini-Swin; the two layers of a stage share their matrices."""
    config = swin(model)
    config.model.shares = (2, 2)
    return config


def pvt(model: str) -> ConfigDict:
    """A PVT or PVTv2 of two stages, of 4x4 and 2x2 tokens with 2x2 keys each."""
    config = _digits(model)
    config.model.strides = (2, 2)
    config.model.widths = (64, 128)
    config.model.depths = (2, 2)
    config.model.head_width = 32
    config.model.ffn_ratios = (4, 4)
    config.model.reductions = (2, 1)
    config.model.drop_path = 0.1
    return config


def distilled(model: str, kind: str) -> ConfigDict:
    """A ViT with the untied ViT of runs/vit_digits as the teacher.

    "hard": its labels, for a distillation token (DeiT); "soft": its probabilities and its relations (MiniViT).
    """
    config = vit(model)
    config.task.name = "distillation"
    config.teacher.init_from = "runs/vit_digits"
    config.model.distilled = kind == "hard"
    if kind == "soft":
        config.distillation.kind = "soft_cross_entropy"
        config.distillation.qkv_weight = 1.0
        config.distillation.hidden_weight = 0.1
        config.distillation.student_layers = config.distillation.teacher_layers = tuple(range(config.model.depth))
    return config


def halved(model: str) -> ConfigDict:
    """The last steps of what `halvit_jax.halve` has made: soft distillation, at a third of the learning rate."""
    config = distilled(model, "soft")
    config.init_from = "runs/halve_digits.safetensors"
    config.total_steps = config.loop.eval_every = config.loop.checkpoint_every = 100
    config.loop.log_every, config.loop.ema_decay = 50, 0.0  # an EMA of so few steps lags far behind
    config.optim.learning_rate, config.optim.warmup_epochs = 1e-3, 1.0
    return config


def _digits(model: str) -> ConfigDict:
    config = default_config()
    config.batch_size = config.recipe_batch_size = 128
    config.total_steps = 1600
    config.loop.log_every = 100
    config.loop.eval_every = 400
    config.loop.checkpoint_every = 400
    config.loop.ema_decay = 0.99
    config.compute_dtype = "float32"

    config.model.name = model
    config.model.num_classes = 10
    config.model.image_size = 8

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.crop = "whole"
    config.data.flip = False
    config.data.shift = 1
    config.data.interpolation = "bilinear"
    config.data.eval_crop = 1.0
    config.data.virtual_shards = 16

    config.task.mean = (0.5, 0.5, 0.5)
    config.task.std = (0.5, 0.5, 0.5)

    config.classification.mixup = 0.8

    config.optim.learning_rate = 3e-3
    config.optim.scaling = "none"
    config.optim.weight_decay = 0.2
    config.optim.warmup_epochs = 20.0
    return config
