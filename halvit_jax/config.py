"""All config fields, with defaults and one line each, and the checks between fields.

A sub-tree is the keyword list of one constructor: `model` of create_model, `data` of make_loaders, `instances` of
make_detection_loaders, `task` with `classification` of Classification, to which `distillation` adds for Distillation,
or with `detection` of Detection, `loop` of loop.train, `save` of Checkpointer, `optim` of make_optimizer, `mesh` of
make_mesh, `cluster` of process_group, `watchdog` of Watchdog, `skip_updates` of make_guard. Each constructor checks its
own values; `validate` checks relations between sub-trees. The tree is locked: unknown names are refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

FORMAT = 1  # of config.json; increased when a field changes its name or its meaning
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
MATMUL_PRECISIONS = ("default", "high", "highest")  # of JAX: in float32 on a TPU 1, 3 or 6 products of bfloat16
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def default_config() -> ConfigDict:
    """The locked config with every field at its default."""
    config = ConfigDict(
        {
            "seed": 0,  # for initialisation, data order, augmentation and stochastic depth
            "batch_size": 128,  # examples per step over all devices and hosts; a multiple of mesh.data x mesh.fsdp
            "recipe_batch_size": 0,  # the batch_size of the recipe; a different one is logged as a warning; 0 disables
            "published_top1": 0.0,  # percent on imagenet2012 that the recipe's publication reports; 0: none
            "total_steps": 0,  # length of the run in steps; this or num_epochs
            "num_epochs": 0,  # length of the run in epochs; this or total_steps
            "init_from": "",  # initial weights: a workdir, or a file of halvit_jax.convert or with PyTorch's names
            "init_ema": True,  # of a source with raw weights and their averages, the averages; False: the raw weights
            "init_positions": "timm",  # resampling of positions to another grid: timm (a=-0.5) or torch (a=-0.75)
            "init_exclude": (),  # paths (regular expressions) that init_from does not fill, e.g. ("^head/",)
            "report_images": 1000,  # of the evaluation set, whose mistakes report.html shows; 0: none
            "compilation_cache": "",  # folder that keeps compiled programs, for a faster start of a resumed run
            "compute_dtype": "auto",  # float32 or bfloat16; auto: bfloat16 on accelerators, float32 on CPU
            "matmul_precision": "highest",  # of products if compute_dtype is float32: default (fast), high or highest
            "model": _model(),
            "data": _data(),
            "instances": _instances(),
            "task": _task(),
            "classification": _classification(),
            "distillation": _distillation(),
            "teacher": _teacher(),
            "detection": _detection(),
            "loop": _loop(),
            "save": _save(),
            "optim": _optim(),
            "mesh": _mesh(),
            "cluster": _cluster(),
            "watchdog": _watchdog(),
            "skip_updates": _skip_updates(),
        }
    )
    return config.lock()


def _model() -> dict[str, Any]:
    """Name and fields of the model; None leaves a field at its value in the family's table of sizes."""
    optional = config_dict.placeholder
    return {
        "name": "halvit_tiny",  # see `python -m halvit_jax.summary`
        "num_classes": 1000,  # size of the classifier; 0: as many as the data set has
        "image_size": optional(int),  # height and width of the images, for the model and the data
        "in_channels": optional(int),  # channels of the images: 3, or 1 for grey ones; task.mean and std have as many
        "drop_path": optional(float),  # stochastic depth of the last block
        "residual_float32": optional(bool),  # ViT, Swin, PVT: residual sums in float32, whatever compute_dtype is
        "remat": False,  # recompute blocks in the backward pass to save memory
        # ViT (DeiT, HaLViT), and others as noted
        "patch_size": optional(int),  # also Swin: side of a patch in pixels
        "width": optional(int),  # width of the tokens; also Swin: that of the first stage
        "depth": optional(int),  # number of blocks
        "num_heads": optional(int),  # attention heads; divides width
        "ffn_ratio": optional(float),  # also Swin: hidden width / width of the feed-forward layer
        "attention": optional(str),  # also Swin: full or tied
        "ffn": optional(str),  # also Swin: dense or tied
        "attention_bias": optional(bool),  # also Swin: biases of queries, keys, values and output
        "pool": optional(str),  # token or mean
        "position": optional(str),  # learned, sincos or none
        "distilled": optional(bool),  # also SHViT: a second classifier, trained on the teacher's predictions
        "attention_impl": optional(str),  # also PVT, Next-ViT: auto, xla or fused (without the maps in memory)
        "ffn_impl": optional(str),  # also Swin, PVT: auto, xla or fused (without the hidden activations in memory)
        # Hallucinated attention and compact FFNs: ViT, PVT, Next-ViT
        "real_heads": optional(float),  # fraction of the heads that compute their own maps
        "hallucinate": optional(str),  # source of the other heads' maps: logits or maps
        "ffn_rank": optional(float),  # rank / width of an FFN's second matrix; below 1 it is a product of two
        "ffn_branches": optional(int),  # number of matrices in the sum that replaces each of the two in training
        # MiniViT
        "share": optional(int),  # Mini-DeiT: consecutive layers with the same matrices; divides depth
        "shares": optional(tuple),  # Mini-Swin: the same in each stage; divide depths
        "mask_unshifted": optional(bool),  # Mini-Swin: mask the unshifted layers too, as its released weights need
        # Networks of stages: ResNet, RegNet, SHViT, Swin, PVT, Next-ViT
        "depths": optional(tuple),  # blocks of each stage
        "widths": optional(tuple),  # RegNet, SHViT, PVT, Next-ViT: channels of each stage
        "stages": optional(tuple),  # kinds; ResNet: basic, bottleneck, halvit or halvit_prenorm; SHViT: i or s
        "head_width": optional(int),  # Swin, PVT, Next-ViT: width of an attention head; divides width, or all widths
        "reductions": optional(tuple),  # PVT: r, one key for r x r tokens; Next-ViT: for r*r tokens in a row
        "stem_strides": optional(tuple),  # SHViT, Next-ViT: strides of the stem's 3x3 convolutions
        # ResNet and RegNet
        "groups": optional(int),  # ResNet: groups of the 3x3 convolutions
        "base_width": optional(int),  # ResNet: channels of a group in the first stage
        "kernel_init": optional(str),  # ResNet: kaiming_fan_out or torch_uniform
        "zero_init_residual": optional(bool),  # ResNet: the scale of each block's last norm starts at 0
        "group_width": optional(int),  # RegNet: channels of a group of the 3x3 convolutions; divides all widths
        # SHViT
        "partial_dims": optional(tuple),  # attention channels, in each stage of kind s
        # Swin
        "window_size": optional(int),  # side of a window, in tokens
        # PVT
        "strides": optional(tuple),  # of each stage's map against the one before
        "ffn_ratios": optional(tuple),  # hidden width / width of the feed-forward layers, in each stage
        "pool_size": optional(int),  # PVTv2: side of the pooled map of keys; 0: use reductions
        # Next-ViT
        "stem_widths": optional(tuple),  # channels of the stem's convolutions
        "periods": optional(tuple),  # one block in this many is a transformer block, from a stage's last; 0: none
    }


def _data() -> dict[str, Any]:
    return {
        "name": "imagenet2012",  # a TFDS data set with the features image and label; or folder: your own images
        "data_dir": "",  # folder of TFDS's prepared data; "" is its default, ~/tensorflow_datasets
        "root": "",  # folder: the images are in root/train_split/<class>/ and root/eval_split/<class>/
        "train_split": "train",  # in TFDS's notation, e.g. train[:90%]
        "eval_name": "",  # another TFDS data set to evaluate on, of the same classes, e.g. imagenet_v2; "": the same
        "eval_split": "validation",
        "evals": (),  # further sets to evaluate on: "name=tfds_name:split" each; of a folder: "name=:split"
        "crop": "random_resized",  # in training: random_resized, or whole (the whole image, resized)
        "min_crop_area": 0.08,  # smallest fraction of the image's area that a random crop takes
        "flip": True,  # random horizontal flip
        "shift": 0,  # random translation, at most this many pixels
        "color_jitter": 0.0,  # largest random change of brightness, contrast and saturation; 0 is off
        "augment": "",  # trivial, three, or RandAugment in timm's notation, e.g. rand-m9-mstd0.5-inc1; "" is off
        "interpolation": "bicubic",  # bilinear or bicubic
        "antialias": False,  # in the training crop's resize; halves the loader's speed. Evaluation always antialiases
        "train_size": 0,  # height and width of the images in training, for models of any size; 0: model.image_size
        "eval_crop": 0.875,  # side of the central crop / side of the resized image, in evaluation
        "eval_resize": "short_side",  # in evaluation: short_side, or squash (both sides, ignoring the aspect ratio)
        "exif_rotation": False,  # rotate images as their EXIF notes, as phones write it; torchvision and timm do not
        "on_bad_image": "error",  # images that cannot be decoded: error, or replace (grey, no weight in training)
        "bad_image_budget": 1e-4,  # largest fraction of an epoch that may be replaced; one image always may
        "balance": 0.0,  # 1: every class is drawn equally often, 0: every image; between: count ** -balance an image
        "repeated_aug": 1,  # repeated augmentation: copies of an example; an epoch has 1 / repeated_aug of the examples
        "virtual_shards": 64,  # parts of the training split, each filling fixed rows of a batch; split over the hosts
        "shuffle_buffer": 16384,  # size of the shuffle buffers in records, over all virtual shards
    }


def _instances() -> dict[str, Any]:
    """The data of detection, for task.name detection, which does not read `data`."""
    return {
        "name": "coco",  # coco: annotation files in COCO's JSON and folders of images; or digits_scenes (embedded)
        "root": "",  # coco: folder that the four paths below start from
        "data_dir": "",  # digits_scenes: folder it is written to; "" is TFDS's default, ~/tensorflow_datasets
        "train_annotations": "annotations/instances_train2017.json",
        "eval_annotations": "annotations/instances_val2017.json",
        "train_images": "train2017",
        "eval_images": "val2017",
        "canvases": ((800, 1344), (1344, 800)),  # (height, width) of batches; an image goes to the smallest that fits
        "short_side": 800,  # of resized images; 0: images keep their size
        "long_side": 1333,  # of resized images, at most
        "train_short_sides": (),  # in training one of them is drawn for each image; () is short_side
        "flip": True,  # random horizontal flip
        "max_objects": 100,  # rows for objects; an image with more is an error
        "keep_empty": False,  # also train on images without objects
        "masks": True,  # with masks of the objects; without, the files need no segmentation
    }


def _task() -> dict[str, Any]:
    return {
        "name": "classification",  # classification, distillation (classification with a teacher) or detection
        "mean": IMAGENET_MEAN,  # of each colour channel, for pixel values in [0, 1]
        "std": IMAGENET_STD,
    }


def _classification() -> dict[str, Any]:
    return {
        "loss": "cross_entropy",  # in training: cross_entropy or binary_cross_entropy
        "bce_threshold": 0.0,  # binary_cross_entropy: targets above it are 1, all others 0; 0: the targets themselves
        "class_weights": (),  # weight of each class in the training loss, in the order of their names; () is 1 for all
        "label_smoothing": 0.0,  # fraction of a target spread over all classes
        "mixup": 0.0,  # alpha of Mixup; 0 is off
        "cutmix": 0.0,  # alpha of CutMix; 0 is off
        "mixup_switch": 0.5,  # probability of CutMix if both are on
        "mixup_mode": "batch",  # batch: one draw for the whole batch; elem: one for each image
        "mix_group": 0,  # rows that share a draw and are partners, a GPU's batch in the references; 0: the whole batch
        "norm_group": 0,  # rows of one statistic of BatchNorm, a GPU's batch in the references; 0: the whole batch
        "erase": 0.0,  # probability of random erasing
        "erase_fill": "noise",  # what fills the erased box: noise, or zero (the mean colour)
    }


def _distillation() -> dict[str, Any]:
    """The losses against the teacher, for task.name distillation."""
    return {
        "kind": "hard",  # classification loss against the teacher: hard, soft or soft_cross_entropy
        "alpha": 0.5,  # weight of that loss; the loss against the labels has 1 - alpha
        "tau": 1.0,  # temperature of soft labels
        "qkv_weight": 0.0,  # weight of the loss on query, key and value relations in pairs of layers; 0: off
        "hidden_weight": 0.0,  # weight of the loss on hidden-state relations in pairs of blocks; 0: off
        "student_layers": (),  # the student's layer of each pair, counted from 0 through the whole network
        "teacher_layers": (),  # the teacher's layer of each pair
    }


def _teacher() -> dict[str, Any]:
    """The teacher, for task.name distillation."""
    optional = config_dict.placeholder
    return {
        "init_from": "",  # its weights: a workdir, or a file of halvit_jax.convert or with PyTorch's names
        "name": "",  # its model, for weights with PyTorch's names; other sources name their model
        "mean": optional(tuple),  # of the colour channels in its training; None: from the file, or the student's
        "std": optional(tuple),
    }


def _detection() -> dict[str, Any]:
    """The detector, for task.name detection, on the backbone of `model`; None leaves a field at its default."""
    optional = config_dict.placeholder
    return {
        "detector": "mask_rcnn",  # mask_rcnn or retinanet
        "num_classes": 80,  # of objects; model.num_classes is 0, because a backbone has no classifier
        "conventions": "mmdet",  # the choices on which libraries differ: mmdet or torchvision
        "neck": "",  # fpn, shvit, plain or plain4; "": that of the backbone's family
        "train_norms": False,  # whether the backbone's BatchNorms train; else they use the statistics they have
        "width": 256,  # channels of the pyramid and the convolutions behind it
        "anchor_scale": optional(float),  # side of the (smallest) square anchor / stride; Mask R-CNN: 8, RetinaNet: 4
        "box_nms": 0.5,  # IoU above which detections of a class suppress each other
        "score_threshold": 0.05,  # of detections
        "detections": 100,  # of an image, at most
        "metric_backend": "pycocotools",  # what computes COCO's metrics: pycocotools, or faster_coco_eval
        "candidates": 2048,  # detections before suppression, of all classes
        "test_candidates": optional(int),  # of a level, before suppression: 1000 anchors, RetinaNet: with their class
        # Mask R-CNN
        "masks": optional(bool),  # False: Faster R-CNN
        "hidden": optional(int),  # width of the box head; 1024
        "mask_depth": optional(int),  # convolutions of the mask head; 4
        "train_candidates": optional(int),  # anchors of a level, before suppression, in training; 2000
        "train_proposals": optional(int),  # boxes that pass to the second stage, in training; 1000
        "test_proposals": optional(int),  # the same in evaluation; 1000
        "rpn_samples": optional(int),  # anchors of an image in the first stage's losses; 256
        "rpn_positives": optional(float),  # largest fraction of them with an object; 0.5
        "rpn_nms": optional(float),  # IoU above which proposals suppress each other; 0.7
        "roi_samples": optional(int),  # proposals of an image in the second stage's losses; 512
        "roi_positives": optional(float),  # largest fraction of them with an object; 0.25
        # RetinaNet
        "head_depth": optional(int),  # convolutions before each output; 4
    }


def _loop() -> dict[str, Any]:
    return {
        "log_every": 50,  # steps between two points of the training curves
        "eval_every": 1000,  # steps between two evaluations; the last step is always evaluated
        "checkpoint_every": 1000,  # steps between two checkpoints; the last step is always saved
        "ema_decay": 0.0,  # decay of the EMA of parameters and BatchNorm statistics; 0 keeps none
        "early_stopping": 0,  # end after this many evaluations in a row without a better score; 0 never
        "accumulate": 1,  # sequential parts of a batch, to save memory; the update is the same
    }


def _save() -> dict[str, int]:
    return {
        "keep": 2,  # number of newest checkpoints to keep
        "keep_best": 1,  # number of checkpoints with the best scores to keep beside them
        "attempts": 3,  # saves in a row that may fail before the run ends; each failure is logged
        "timeout": 600,  # seconds for all hosts to write their part of a checkpoint
    }


def _optim() -> dict[str, Any]:
    return {
        "name": "adamw",  # adamw, lamb or sgd
        "learning_rate": 5e-4,  # peak, at base_batch_size
        "scaling": "linear",  # multiply it by batch_size / base_batch_size: linear, sqrt (of that ratio) or none
        "base_batch_size": 512,  # batch size of learning_rate
        "weight_decay": 0.05,
        "no_decay": (r"bias$", r"scale$", r"position/embedding$", r"(class|distill)_token$"),  # without weight decay
        "frozen": (),  # paths that are not trained; BatchNorm statistics are still updated
        "layer_decay": 1.0,  # learning rate of a layer / that of the layer above it; 1 is off
        "layers": (r"^(?:embed|\w+_token|position|stem)", r"^block(\d+)/", r"^stage(\d+)/", r""),  # in forward order
        "beta1": 0.9,  # adamw, lamb
        "beta2": 0.999,  # adamw, lamb
        "epsilon": 1e-8,  # adamw, lamb
        "momentum": 0.9,  # sgd
        "clip_norm": 0.0,  # largest norm of the whole gradient; 0 is no limit
        "clip_adaptive": 0.0,  # largest norm of a unit's gradient / that of its weights (AGC); 0 is no limit
        "no_clip_adaptive": (r"^head/",),  # paths without it
        "schedule": "cosine",  # cosine, cosine_after_warmup, step or constant, after a linear warm-up
        "warmup_epochs": 5.0,
        "warmup_steps": 0,  # in place of warmup_epochs, where above 0
        "warmup_start": 1e-6,  # learning rate of the first step; not scaled with the batch
        "floor": 1e-5,  # final learning rate of cosine; not scaled with the batch
        "step_epochs": 30.0,  # step: epochs between two reductions
        "milestones": (),  # step: the epochs of the reductions, in place of every step_epochs
        "step_factor": 0.1,  # step: factor of a reduction
    }


def _mesh() -> dict[str, int]:
    return {
        "data": -1,  # copies of the parameters; -1: the devices divided by the other axes
        "fsdp": 1,  # shards of parameters and batch
        "tensor": 1,  # shards of parameters only
    }


def _cluster() -> dict[str, int]:
    return {
        "start_timeout": 300,  # seconds for all processes to connect; also for the shutdown
        "heartbeat_timeout": 100,  # seconds of silence after which a process counts as dead
    }


def _watchdog() -> dict[str, float]:
    return {
        "timeout": 900.0,  # seconds without a step, a batch or a save after which a run counts as stalled and is killed
        "compile_timeout": 3600.0,  # the same while a step is compiled
    }


def _skip_updates() -> dict[str, Any]:
    return {
        "norm_factor": 0.0,  # skip updates whose gradient norm exceeds this times its average or is not finite; 0: off
        "max_skipped": 10,  # more skipped updates than this within the window end the run
        "window": 1000,  # in steps
    }


def validate(config: ConfigDict) -> None:
    """Raise a ValueError for inconsistent values that no constructor checks."""
    if bool(config.total_steps) == bool(config.num_epochs):
        raise ValueError(
            f"total_steps={config.total_steps} and num_epochs={config.num_epochs}: set one of them above 0 and leave "
            "the other at 0"
        )
    loop = {name: value for name, value in config.loop.items() if name not in ("ema_decay", "early_stopping")}
    counts = {"batch_size": config.batch_size, **_named("loop", loop), **_named("save", config.save)}
    for name, value in counts.items():
        if value < (0 if name == "save.keep_best" else 1):
            raise ValueError(f"{name}={value} must be at least {0 if name == 'save.keep_best' else 1}")
    for name, value in (_named("cluster", config.cluster) | _named("watchdog", config.watchdog)).items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be a positive number of seconds")
    for name in ("total_steps", "num_epochs", "seed", "recipe_batch_size", "report_images"):
        if config[name] < 0:
            raise ValueError(f"{name}={config[name]} must not be negative")
    if config.loop.early_stopping < 0:
        raise ValueError(f"loop.early_stopping={config.loop.early_stopping} must not be negative")
    if not 0.0 <= config.loop.ema_decay < 1.0:
        raise ValueError(f"loop.ema_decay={config.loop.ema_decay} must lie in [0, 1)")
    for name in ("mix_group", "norm_group"):
        group = config.classification[name]
        for field, rows in (
            ("", config.batch_size),
            (" / loop.accumulate", config.batch_size // config.loop.accumulate),
        ):
            if 0 < group < rows and rows % group:
                raise ValueError(
                    f"classification.{name}={group} does not divide batch_size{field} = {rows}; set it to a divisor of "
                    "that, or to 0 for the whole batch"
                )
    if config.compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype={config.compute_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
    if config.matmul_precision not in MATMUL_PRECISIONS:
        raise ValueError(f"matmul_precision={config.matmul_precision!r} is not one of {', '.join(MATMUL_PRECISIONS)}")
    if config.task.name == "distillation" and not config.teacher.init_from:
        raise ValueError(
            "task.name='distillation' needs a teacher; set teacher.init_from to a workdir or a weight file, or "
            "task.name='classification'"
        )
    if config.task.name in ("classification", "detection") and config.teacher.init_from:
        raise ValueError(
            f"teacher.init_from={config.teacher.init_from} needs task.name='distillation', not {config.task.name!r}; "
            "change one of them"
        )
    if config.task.name == "detection":
        wanted = config.detection.detector == "mask_rcnn" and config.detection.masks is not False
        if wanted and not config.instances.masks:
            raise ValueError(
                "instances.masks=False leaves nothing to learn masks from; set detection.masks=False too, or "
                "detection.detector='retinanet'"
            )


def smoke(config: ConfigDict) -> ConfigDict:
    """The config shortened to 20 steps with two evaluations, two checkpoints and four reports."""
    config = config.copy_and_resolve_references()
    config.total_steps, config.num_epochs = 20, 0
    config.loop.log_every = 5
    config.loop.eval_every = config.loop.checkpoint_every = 10
    config.optim.warmup_epochs = 0.0
    if config.data.name != "folder" and "[" not in config.data.eval_split:
        config.data.eval_split += "[:1%]"
    return config


def flat_fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields by their full names, such as "model.width", as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= flat_fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.loads(json.dumps(value))
    return found


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, with its format number."""
    return json.dumps({"format": FORMAT, **config.to_dict()}, indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`; missing fields keep their default.

    Raises:
        ValueError: another format, or an unknown field.
    """
    config = default_config()
    try:
        fields = json.loads(text)
        given = fields.pop("format", None)
        if given != FORMAT:
            raise ValueError(f"config.json has format={given}, but this version of the library reads format={FORMAT}")
        task = fields.get("task", {}).get("name")
        if task not in config and isinstance(fields.get(task), dict):
            add_task_fields(config, task, fields.pop(task))
        config.update(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a config of this library: {error}") from error
    return config


def add_task_fields(config: ConfigDict, task: str, fields: Mapping[str, Any]) -> None:
    """Add the sub-tree of a task that is registered in `experiment.tasks.TASKS` from outside this package."""
    with config.unlocked():
        config[task] = ConfigDict(dict(fields))


def _named(tree: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under their full names: save.keep, ..."""
    return {f"{tree}.{name}": value for name, value in fields.items()}
