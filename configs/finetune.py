"""A DeiT or HaLViT of 224 pixels, fine-tuned on ImageNet-1k at 384 for 30 epochs.

python -m halvit_jax.main --config=configs/finetune.py --workdir=runs/finetune --config.init_from=SOURCE

`configs/finetune.py:halvit_small` fine-tunes another model. SOURCE is the workdir of a run at 224, or a weight file.
The values are those that DeiT (Touvron et al., 2021) and the projects after it fine-tune with. For other data, set
`data.name` or `data.root`, and `model.num_classes`: the classifier is then initialised anew.

Hardware: a TPU v5e-16 or 8 GPUs of 80 GB. Expected time: not measured.
Published top-1: 82.9 (DeiT-B at 384). Measured here: not yet.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import imagenet
from halvit_jax.recipes.variants import choose

VARIANTS = (("deit_base", "deit_tiny", "deit_small", "halvit_tiny", "halvit_small"),)


def get_config(variant: str = "") -> ConfigDict:
    """The run of a model at 384 pixels."""
    (model,) = choose(variant, *VARIANTS)
    return imagenet.deit_384(model)
