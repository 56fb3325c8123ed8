"""Boxes and masks over images."""

import jax
import jax.numpy as jnp
import numpy as np

from halvit_jax.tasks.drawing import COLOURS, draw


def test_an_outline_lies_inside_of_its_box_and_a_mask_fills_its_part() -> None:
    images = jnp.zeros((1, 20, 24, 3))
    boxes = jnp.asarray([[[4.0, 6, 14, 16], [0, 0, 24, 20]]])
    masks = jnp.zeros((1, 2, 4, 4)).at[:, 0, :, 2:].set(1)  # the right half
    shown = jnp.asarray([[True, False]])
    drawn = np.asarray(jax.jit(draw)(images, boxes, jnp.asarray([[1, 0]]), shown, masks))[0]
    colour = COLOURS[1] / 255
    np.testing.assert_allclose(drawn[6, 4:14], np.tile(colour, (10, 1)), atol=1e-6)
    np.testing.assert_allclose(drawn[10, 12:14], np.tile(colour, (2, 1)), atol=1e-6)
    np.testing.assert_allclose(drawn[10, 11], colour / 2, atol=1e-6)
    assert not drawn[10, 7].any()
    assert not drawn[:6].any()
    assert not drawn[:, 14:].any()


def test_boxes_without_masks_are_outlined_alone() -> None:
    drawn = draw(
        jnp.zeros((1, 8, 8, 3)), jnp.asarray([[[1.0, 1, 7, 7]]]), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    )
    assert not drawn[0, 3:5, 3:5].any()
    assert drawn[0, 1, 1].any()
