"""The quickstart's HaLViT fine-tuned on digits of 12x12 pixels instead of 8x8, in a minute.

python -m halvit_jax.main --config=configs/finetune_digits.py --workdir=runs/finetune_digits

It starts from runs/halvit_digits; `--config.init_from=SOURCE` names another workdir or a weight file. The positions are
resampled from 4x4 to 6x6.
"""

from ml_collections import ConfigDict

from halvit_jax.recipes import digits
from halvit_jax.recipes.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """An eighth of the quickstart's steps, at a third of its learning rate."""
    choose(variant)
    config = digits.vit("halvit_tiny")
    config.init_from = "runs/halvit_digits"
    config.model.image_size = 12
    config.total_steps = 200
    config.loop.eval_every = config.loop.checkpoint_every = 100
    config.loop.log_every = 50
    config.optim.learning_rate = 1e-3
    config.optim.warmup_epochs = 2.0
    return config
