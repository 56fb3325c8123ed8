"""RegNets under timm's names."""

import math

from helpers.official import official_shapes

from halvit_jax.convert import torch_shapes


def test_the_teacher_has_the_names_of_the_smallest_for_more_blocks() -> None:
    official = official_shapes("regnety_002")
    shapes = torch_shapes("regnety_160")
    expected = {name for name in official if not name.startswith("s")} | {n for n in official if n.startswith("stem")}
    for stage, depth in enumerate((2, 4, 11, 1), start=1):
        for block in range(1, depth + 1):
            like = "s4.b2." if block > 1 else "s4.b1."  # only the first block of a stage has a downsampling
            expected |= {n.replace(like, f"s{stage}.b{block}.") for n in official if n.startswith(like)}
    assert set(shapes) == expected
    weights = {name: shape for name, shape in shapes.items() if "running" not in name and "tracked" not in name}
    assert sum(math.prod(shape) for shape in weights.values()) == 83_590_140
