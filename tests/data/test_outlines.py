import numpy as np
import pytest

from halvit_jax.data import rle
from halvit_jax.data.outlines import outlines, segmentation, uncompressed


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_segmentation_is_the_mask_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 15)) < (0.2, 0.5, 0.8)[seed % 3]
    if seed % 2:  # parts that touch at corners
        mask = np.kron(mask[:4, :5], np.ones((3, 3), bool))
    found = segmentation(mask)
    if isinstance(found, dict):
        drawn = rle.draw_runs(rle.compressed(found, *mask.shape), *mask.shape)
    else:
        drawn = rle.draw_polygons([np.array(polygon, np.float32) for polygon in found], *mask.shape)
    np.testing.assert_array_equal(drawn, mask)


def test_outlines_go_around_each_part_and_not_around_holes() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:4] = mask[3:5, 4:6] = True  # two parts that touch at a corner
    assert outlines(mask) == [[4, 1, 4, 3, 1, 3, 1, 1], [6, 3, 6, 5, 4, 5, 4, 3]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert outlines(ring) is None
    assert segmentation(ring) == uncompressed(ring) == {"size": [3, 3], "counts": [0, 4, 1, 4]}
