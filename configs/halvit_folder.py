"""HaLViT-T from scratch on a folder of your own images: root/train/<class>/*.jpg and root/val/<class>/*.jpg

python -m halvit_jax.main --config=configs/halvit_folder.py --workdir=runs/halvit_folder \
    --config.data.root=DIR --config.model.num_classes=10

Classes are the sub-folders, numbered by name; dataset.json in the workdir keeps their names. JPEG, PNG, BMP and GIF are
read. For small images lower model.image_size and model.patch_size, e.g. to 32 and 4.

Hardware: one GPU of 8 GB and more; with small images a CPU. Expected time and accuracy: those of your images.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """DeiT's recipe, made for some thousands of images instead of a million."""
    choose(variant)
    config = imagenet.deit("halvit_tiny")
    config.batch_size = config.recipe_batch_size = 128
    config.loop.ema_decay = 0.999  # DeiT's averages of 25,000 steps would be longer than such a run
    config.published_top1 = 0.0
    config.model.num_classes = 10  # as many as there are class folders
    config.data.name = "folder"
    config.data.eval_split = "val"
    config.data.repeated_aug = 1  # an epoch is every image once
    config.data.virtual_shards = 8
    return config
