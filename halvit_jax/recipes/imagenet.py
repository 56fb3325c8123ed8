"""Recipes on ImageNet-1k of DeiT and of what descends from it: SHViT, MiniViT, Swin, PVT and Next-ViT.

Each function makes a config with its values, for the files of `configs/` to start from. What the values are and which
file of the reference repositories says so is in `tests/golden/recipes.json`.
"""

from ml_collections import ConfigDict

from halvit_jax.config import default_config
from halvit_jax.recipes.published import top1


def deit(model: str) -> ConfigDict:
    """DeiT (Touvron et al., 2021): the recipe of every model shaped like a ViT, 300 epochs.

    There is no colour jitter, because timm disables it with RandAugment. The released accuracies are those of the
    non-EMA weights; the EMA is evaluated too.
    """
    config = default_config()
    config.num_epochs = 300
    config.batch_size = config.recipe_batch_size = 1024
    config.published_top1 = top1(model)
    config.loop.ema_decay = 0.99996
    config.model.name = model
    config.model.drop_path = 0.1
    config.data.augment = "rand-m9-mstd0.5-inc1"
    config.data.antialias = True
    config.data.repeated_aug = 3
    config.classification.label_smoothing = 0.1
    config.classification.mixup = 0.8
    config.classification.cutmix = 1.0
    config.classification.mix_group = 64 if model == "deit_base" else 256
    config.classification.erase = 0.25
    config.optim.name = "adamw"
    config.optim.learning_rate = 5e-4
    config.optim.base_batch_size = 512
    config.optim.weight_decay = 0.05
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_start = 1e-6
    config.optim.floor = 1e-5
    return config


def deit_distilled(model: str) -> ConfigDict:
    """DeiT's distillation: a second token and classifier learn the labels that a RegNetY-16GF predicts."""
    config = deit(model)
    config.published_top1 = top1(model, DISTILLED)
    config.model.name = f"{model}_distilled"
    _set_teacher(config, "regnety_160", kind="hard", alpha=0.5)
    return config


def deit_384(model: str) -> ConfigDict:
    """DeiT's fine-tuning at 384 pixels of what was trained at 224.

    A constant 5e-6 for 30 epochs, hardly any decay, and no stochastic depth: the released code leaves the model in
    evaluation mode.
    """
    config = _fine_tune(deit(model), batch_size=512, learning_rate=5e-6)
    config.init_positions = "torch"
    config.classification.mix_group = 32
    config.published_top1 = top1(model, AT_384)
    config.optim.schedule = "constant"
    config.model.drop_path = 0.0
    return config


def regnety(model: str) -> ConfigDict:
    """The teacher of DeiT: a RegNetY with DeiT's data and augmentation, without stochastic depth.

    The paper states no more than that. The optimizer is ours: DeiT's.
    """
    config = deit(model)
    config.model.drop_path = 0.0
    return config


def mini_deit(model: str, *, drop_path: float, variant: str = "") -> ConfigDict:
    """Mini-DeiT (Zhang et al., 2022): DeiT's recipe with less stochastic depth.

    The tables of relative positions are decayed, the position embedding is not, as released. Without a `variant` it
    learns from the labels alone; "distilled": from nothing but the probabilities of a RegNetY-16GF; "384": fine-tuning
    at 384 pixels, on the labels and without stochastic depth. Its rate rises: the released floor of 5e-6 lies above
    the 2.5e-6 that the warm-up leads to.
    """
    config = deit(model)
    config.published_top1 = top1(model, variant)
    config.model.drop_path = drop_path
    config.classification.mix_group = 128
    if variant == AT_384:
        _fine_tune(config, batch_size=256, learning_rate=5e-6)
        config.init_positions = "torch"
        config.classification.mix_group = 32
        config.optim.floor = 5e-6
        config.model.drop_path = 0.0
    if variant == DISTILLED:
        _set_teacher(config, "regnety_160", kind="soft", alpha=1.0)
    return config


def swin(model: str, *, drop_path: float, variant: str = "") -> ConfigDict:
    """Swin Transformer (Liu et al., 2021).

    Differences from DeiT's: a longer warm-up, clipped gradients, no repeated augmentation, no EMA, and no decay of the
    tables of relative positions. The start of the warm-up and the floor are those for a batch of 1024. The variant
    "384" is fine-tuning at 384 pixels in windows of twelve, with resampled tables.
    """
    config = deit(model)
    config.published_top1 = top1(model, variant)
    config.loop.ema_decay = 0.0
    config.model.drop_path = drop_path
    config.data.repeated_aug = 1
    config.classification.mix_group = 64 if model == "swin_base" else 128
    config.optim.no_decay = (*config.optim.no_decay, r"position_bias/table$")
    config.optim.clip_norm = 5.0
    config.optim.warmup_epochs = 20.0
    config.optim.warmup_start = 1e-6
    config.optim.floor = 1e-5
    if variant == AT_384:
        _squash(_fine_tune(config, batch_size=1024, learning_rate=2e-5))
        config.model.window_size = 12
        config.init_positions = "torch"
        config.optim.warmup_epochs = 5.0
        config.optim.warmup_start = 4e-8
        config.optim.floor = 4e-7
    return config


def pvt(model: str) -> ConfigDict:
    """PVT and PVTv2 (Wang et al., 2021): DeiT's recipe without EMA.

    The large models have more stochastic depth and clipped gradients. Unlike a ViT's, PVT's positions are decayed, as
    released.
    """
    config = deit(model)
    config.loop.ema_decay = 0.0
    config.classification.mix_group = 128
    if model.removesuffix("_hc") in PVT_LARGE:
        config.model.drop_path = 0.3
        config.optim.clip_norm = 1.0
    return config


PVT_LARGE = ("pvt_medium", "pvt_large", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")


def mini_swin(model: str, *, drop_path: float, variant: str = "") -> ConfigDict:
    """Mini-Swin (Zhang et al., 2022): Swin's recipe with less stochastic depth.

    `variant` is as for Swin, or "distilled": from nothing but the logits of a Swin-B and the relations between its
    tokens, in six pairs of layers. A Swin-B has 24 layers, as all but the twelve of Mini-Swin-T. At 384 the batch, the
    start of the warm-up and the floor differ from Swin's, and the evaluation crops.
    """
    config = swin(model, drop_path=drop_path, variant="" if variant == DISTILLED else variant)
    config.published_top1 = top1(model, variant)
    if variant == AT_384:
        config.batch_size = config.recipe_batch_size = 256
        config.data.eval_crop, config.data.eval_resize = 0.875, "short_side"
        config.classification.mix_group = 16
        config.optim.warmup_start = 2.5e-7
        config.optim.floor = 2.5e-6
    if variant == DISTILLED:
        layers = (1, 3, 9, 15, 21, 23)
        student = (1, 3, 5, 7, 9, 11) if model == "mini_swin_tiny" else layers
        _set_teacher(config, "swin_base", kind="soft_cross_entropy", alpha=1.0, qkv_weight=1.0, hidden_weight=0.1)
        config.distillation.update(student_layers=student, teacher_layers=layers)
    return config


def shvit(model: str, *, variant: str = "") -> ConfigDict:
    """SHViT (Yun and Ro, 2024, and the released code): DeiT's recipe with another clipping, decay and learning rate.

    The paper's learning rate is 1e-3; the released code multiplies it by batch / 512, so the published models were
    trained with 4e-3. Gradients are clipped unit by unit; as we read the code, the classifier's too. Training is in
    float32, without stochastic depth. Variants: "distilled" adds a second classifier for the labels of a RegNetY-16GF;
    "384" and "512" are fine-tuning at that many pixels.

    Raises:
        ValueError: a model without a published weight decay.
    """
    if model not in SHVIT_DECAY:
        raise ValueError(f"model.name={model!r} has no published SHViT recipe; one of {', '.join(SHVIT_DECAY)} has")
    config = deit(model)
    config.published_top1 = top1(model, variant)
    config.batch_size = config.recipe_batch_size = 2048
    config.compute_dtype = "float32"
    config.model.drop_path = None
    config.classification.norm_group = config.classification.mix_group = 256
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = SHVIT_DECAY[model]
    config.optim.clip_adaptive = 0.02
    config.optim.no_clip_adaptive = ()
    if variant in FINE_TUNED:
        _squash(_fine_tune(config, batch_size=2048, learning_rate=1e-3, image_size=int(variant)))
    if variant == DISTILLED:
        config.model.name = f"{model}_distilled"
        _set_teacher(config, "regnety_160", kind="hard", alpha=0.5)
    return config


def nextvit(model: str, *, drop_path: float, variant: str = "") -> ConfigDict:
    """Next-ViT (Li et al., 2022, and the released code): DeiT's recipe in larger batches.

    The learning rate is 2e-3 at the batch of 2048. Against DeiT's: twice the weight decay, a longer warm-up, gradients
    clipped, no repeated augmentation and no EMA. The variant "384" is fine-tuning at 384 pixels, of which the log of B
    shows another rate than that of S and L.
    """
    config = deit(model)
    config.published_top1 = top1(model, variant)
    config.batch_size = config.recipe_batch_size = 2048
    config.loop.ema_decay = 0.0
    config.model.drop_path = drop_path
    config.data.repeated_aug = 1
    config.classification.norm_group = config.classification.mix_group = 256
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 5.0
    config.optim.warmup_epochs = 20.0
    if variant == AT_384:
        _fine_tune(config, batch_size=1024, learning_rate=1.5e-6 if model == "nextvit_base" else 5e-6)
        config.classification.norm_group = config.classification.mix_group = 128
        config.optim.schedule = "constant"
        config.optim.warmup_epochs = 0.0
    return config


DISTILLED, AT_384 = "distilled", "384"
FINE_TUNED = (AT_384, "512")  # of SHViT
SHVIT_DECAY = {"shvit_s1": 0.025, "shvit_s2": 0.032, "shvit_s3": 0.035, "shvit_s4": 0.03}


def _fine_tune(config: ConfigDict, *, batch_size: int, learning_rate: float, image_size: int = 384) -> ConfigDict:
    """Change a recipe to 30 epochs of fine-tuning at more pixels; `init_from` comes from the command line."""
    config.num_epochs = 30
    config.batch_size = config.recipe_batch_size = batch_size
    config.model.image_size = image_size
    config.optim.learning_rate = learning_rate
    config.optim.weight_decay = 1e-8
    return config


def _squash(config: ConfigDict) -> ConfigDict:
    """Evaluation on the whole image, resized to a square."""
    config.data.eval_crop, config.data.eval_resize = 1.0, "squash"
    return config


def _set_teacher(config: ConfigDict, teacher: str, **fields: object) -> None:
    """Distillation from this teacher; its weights, `teacher.init_from`, come from the command line."""
    config.task.name = "distillation"
    config.teacher.name = teacher
    config.distillation.update(fields)
