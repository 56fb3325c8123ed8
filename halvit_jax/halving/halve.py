"""Halving in one call, for models and images in memory."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from halvit_jax.halving.checks import check_images, check_pair, check_settings, check_teacher
from halvit_jax.halving.vit import HalvedBlock, Settings, assembled, halved_blocks
from halvit_jax.models.vit import TIED, VisionTransformer


def halve(
    model: VisionTransformer,
    variables: Mapping[str, Any],
    images: np.ndarray,
    *,
    attention: str = TIED["attention"],
    ffn: str = TIED["ffn"],
    attention_bias: bool | None = None,
    log: Callable[[str], None] | None = None,
    **settings: Any,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A trained DeiT as a HaLViT of the same shape, and its variables.

    Args:
        model: a VisionTransformer, such as a DeiT.
        variables: its own.
        images: some hundred images [b, h, w, 3], normalised as in its training. No labels are read.
        attention: "tied", or "full" to keep it.
        ffn: "tied", or "dense" to keep it.
        attention_bias: biases in the tied attention; None: none, or, where it is kept, the model's own.
        log: gets one line for each block; None: nobody does.
        settings: fields of `halving.vit.Settings`, such as `fit_steps` and `seed`.

    Raises:
        ValueError: a model that cannot be halved, images of another size, or too few.
    """
    check_teacher(model)
    if attention_bias is None:
        attention_bias = model.attention_bias if attention == model.attention else TIED["attention_bias"]
    student = model.clone(attention=attention, ffn=ffn, attention_bias=attention_bias)
    check_pair(model, student)
    check_images(model, len(images), images.shape[1:3])
    given = Settings(**settings)
    check_settings(given, 1)
    batches = (np.asarray(images[first : first + given.batch]) for first in range(0, len(images), given.batch))
    blocks: list[HalvedBlock] = []
    for block in halved_blocks(model, student, variables["params"], batches, given):
        if log:
            log(line(len(blocks), block))
        blocks.append(block)
    return student, {"params": assembled(variables["params"], blocks)}


def line(number: int, block: HalvedBlock) -> str:
    """The errors of a block as text."""
    attention, ffn = (f"{each.before:.3g} -> {each.after:.3g}" for each in (block.attention, block.ffn))
    return f"block {number}: error of attention {attention}, of the feed-forward layer {ffn}"
