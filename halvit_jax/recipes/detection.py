"""Recipes of Mask R-CNN and RetinaNet: COCO in 12 epochs, and the embedded scenes of digits in minutes.

COCO's are mmdetection's 1x schedule with the optimizer that each backbone was published with (DETECTORS says which
have no published result). All of them need `init_from`, the backbone's ImageNet weights.
"""

from ml_collections import ConfigDict

from halvit_jax.config import default_config

RESNETS = ("resnet50", "resnet18", "resnet101", "halvit_resnet50")
PVT = tuple(f"pvt_{size}" for size in ("tiny", "small", "medium", "large"))
PVT_V2 = tuple(f"pvt_v2_b{number}" for number in range(6))
SWINS = ("swin_tiny", "swin_small", "mini_swin_tiny", "mini_swin_small")
HALVIT = ("halvit_tiny", "halvit_small")
OTHERS = ("shvit_s4", "nextvit_small")
# {detector: backbones}, as `python -m halvit_jax.summary` lists them. Published are, with Mask R-CNN, all but the
# Mini-Swins, the HaLViT-ResNet and ResNet-18; with RetinaNet, the PVTs, the PVTv2s, the ResNets and the SHViT. HaLViT's
# detectors are published without their recipe; ours is PVT's.
DETECTORS: dict[str, tuple[str, ...]] = {
    "mask_rcnn": (*HALVIT, *PVT, *PVT_V2, *SWINS, *OTHERS, *RESNETS),
    "retinanet": (*PVT, *PVT_V2, *SWINS, *OTHERS, *RESNETS),
}
NORMS = (r"norm\w*/(scale|bias)$",)
DROP_PATH = {"swin": 0.2, "mini_swin_tiny": 0.0, "mini_swin": 0.1, "pvt_medium": 0.0, "pvt_large": 0.0, "pvt": 0.1}


def coco(detector: str, backbone: str) -> ConfigDict:
    """The 1x schedule: 12 epochs in batches of 16, a tenth of the rate after epochs 8 and 11, no EMA, no clipping."""
    config = default_config()
    config.num_epochs = 12
    config.batch_size = config.recipe_batch_size = 16
    config.task.name = "detection"
    config.detection.detector = detector
    config.model.name = backbone
    config.model.num_classes = 0
    config.model.drop_path = next((rate for name, rate in DROP_PATH.items() if backbone.startswith(name)), None)
    config.loop.eval_every = config.loop.checkpoint_every = 7330  # an epoch
    config.optim.scaling = "sqrt"
    config.optim.base_batch_size = 16
    config.optim.schedule = "step"
    config.optim.milestones = (8.0, 11.0)
    config.optim.warmup_steps = 500
    _set_optimizer(config, detector, backbone)
    return config


def coco_3x(detector: str, backbone: str) -> ConfigDict:
    """The 3x schedule: 36 epochs, a tenth of the rate after 27 and 33, on images of several sizes."""
    config = coco(detector, backbone)
    config.num_epochs = 36
    config.optim.milestones = (27.0, 33.0)
    config.instances.train_short_sides = tuple(range(480, 801, 32))
    return config


def scenes(detector: str, backbone: str) -> ConfigDict:
    """Scenes of digits on 192x192 pixels, a detector of 1.6M parameters: minutes on two cores, with no data at hand."""
    config = default_config()
    config.total_steps = 900
    config.batch_size = config.recipe_batch_size = 8
    config.loop.log_every = 50
    config.loop.eval_every = config.loop.checkpoint_every = 300
    config.compute_dtype = "float32"
    config.task.name = "detection"
    config.model.name = backbone
    config.model.num_classes = 0
    config.model.image_size = 192
    config.model.update(SCENES[backbone])
    config.instances.name = "digits_scenes"
    config.instances.canvases = ((192, 192),)
    config.instances.short_side = 0
    config.instances.flip = False
    config.instances.max_objects = 32
    config.detection.update(
        detector=detector,
        num_classes=10,
        train_norms=True,
        width=64,
        test_candidates=200,
        detections=50,
        candidates=512,
    )
    if detector == "mask_rcnn":
        config.detection.update(
            anchor_scale=4.0,
            hidden=128,
            mask_depth=2,
            train_candidates=200,
            train_proposals=100,
            test_proposals=100,
            rpn_samples=64,
            roi_samples=64,
        )
    else:
        config.instances.masks = False
        config.detection.update(anchor_scale=2.0, head_depth=2)
    config.optim.learning_rate = 1e-3
    config.optim.scaling = "none"
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 5.0
    config.optim.schedule = "step"
    config.optim.milestones = (5.04, 6.48)  # after 70 and 90 % of 7.2 epochs
    config.optim.warmup_steps = 50
    return config


SCENES = {
    "halvit_tiny": {"patch_size": 8, "width": 192, "depth": 4, "num_heads": 6},
    "deit_small": {"patch_size": 8, "width": 192, "depth": 4, "num_heads": 6},
    "regnety_002": {"depths": (1, 2, 2, 2), "widths": (32, 64, 128, 192), "group_width": 16},
}


def _set_optimizer(config: ConfigDict, detector: str, backbone: str) -> None:
    optim, rate = config.optim, 2e-4
    optim.no_decay = ()
    optim.weight_decay = 0.05
    if backbone.startswith(("pvt", "halvit_t", "halvit_s")):
        optim.weight_decay = 1e-4
        rate = 1e-4 if detector == "retinanet" else 2e-4
        if backbone in ("pvt_v2_b4", "pvt_v2_b5") and detector == "mask_rcnn":
            rate /= 1.4
            config.batch_size = config.recipe_batch_size = optim.base_batch_size = 8
            config.loop.eval_every = config.loop.checkpoint_every = 14660
    else:
        rate = 1e-4
    if backbone.startswith("halvit"):
        config.model.remat = "resnet" not in backbone
    if "swin" in backbone:
        optim.no_decay = (*NORMS, r"position_bias/table$")
        optim.warmup_steps = 1000
    below = 1e3  # the first step's rate is as many times lower
    if backbone == "nextvit_small":
        optim.no_decay, below = NORMS, 1e6
    if "resnet" in backbone:
        optim.name, optim.scaling, optim.weight_decay = "sgd", "linear", 1e-4
        rate = 0.01 if detector == "retinanet" else 0.02
    if "resnet" in backbone or backbone == "nextvit_small":
        optim.frozen = (r"^backbone/stem/", r"^backbone/stage1/")
    optim.learning_rate, optim.warmup_start = rate, rate / below
