"""Boxes and masks drawn over images on the device, for TensorBoard.

Shapes: `n` images, `h w` canvas, `g` boxes of an image, `r` rows and columns of a mask.
"""

import jax
import jax.numpy as jnp
import numpy as np

LINE = 2.0  # pixels of an outline
COLOURS = np.asarray([(255, 90, 70), (80, 200, 120), (70, 140, 255), (250, 200, 50), (200, 100, 240), (60, 210, 220)])


def draw(
    images: jax.Array, boxes: jax.Array, labels: jax.Array, shown: jax.Array, masks: jax.Array | None = None
) -> jax.Array:
    """Images [n, h, w, 3] in [0, 1] with the outlines of their boxes [n, g, 4] where `shown` [n, g].

    A label [n, g] chooses the colour. `masks` [n, g, r, r] in [0, 1] fill their boxes; from .5 on they colour a pixel.
    """
    if masks is None:
        masks = jnp.zeros((*boxes.shape[:2], 1, 1))
    rows, columns = (jnp.arange(size, dtype=jnp.float32) + 0.5 for size in images.shape[1:3])
    colours = jnp.asarray(COLOURS, jnp.float32) / 255

    def add(image: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        (x1, y1, x2, y2), label, show, mask = one
        colour = colours[label % len(colours)][None, None]
        # How far a pixel is inside of the box, which is negative outside.
        depth = jnp.minimum(
            jnp.minimum(rows - y1, y2 - rows)[:, None], jnp.minimum(columns - x1, x2 - columns)[None, :]
        )
        values = _weights(rows, y1, y2, mask.shape[0]) @ mask @ _weights(columns, x1, x2, mask.shape[1]).T
        filled = jnp.where((values >= 0.5)[..., None], 0.5 * image + 0.5 * colour, image)
        outlined = jnp.where(((depth >= 0) & (depth < LINE))[..., None], colour, filled)
        return jnp.where(show, outlined, image), None

    def all_of(image: jax.Array, *of: jax.Array) -> jax.Array:
        return jax.lax.scan(add, image, of)[0]

    return jax.vmap(all_of)(images, boxes, labels, shown, masks.astype(jnp.float32))


def _weights(pixels: jax.Array, start: jax.Array, end: jax.Array, cells: int) -> jax.Array:
    """The bilinear weight of each cell at each pixel: [pixels, cells]."""
    place = (pixels - start) / jnp.maximum(end - start, 1e-6) * cells - 0.5
    return jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(cells, dtype=jnp.float32)[None]), 0)
