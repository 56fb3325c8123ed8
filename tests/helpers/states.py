"""A mesh of eight devices, partition rules and an optimizer for tests of train states."""

from halvit_jax.config import default_config
from halvit_jax.training.optim import Optimizer, make_optimizer

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
RULES = (
    ("special/kernel$", ("tensor",)),
    ("wide/kernel$", (None, ("tensor", "fsdp"))),
    ("kernel$", ("fsdp", "tensor")),
    ("conv", (None, None, None, "fsdp")),
    ("bias$", ()),
)


def small_optimizer() -> Optimizer:
    """AdamW with the default fields."""
    return make_optimizer(**default_config().optim, batch_size=8, steps_per_epoch=1, total_steps=100)
