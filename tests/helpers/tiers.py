"""What the default tier takes, so that it stays under ten minutes; the tests of the rest are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

CORE = {"deit_tiny", "halvit_tiny", "resnet50", "halvit_resnet50", "shvit_s1"}
KINDS = CORE | {  # of every family one, at its smallest
    *("deit_tiny_hc", "mini_deit_tiny", "swin_tiny", "mini_swin_tiny", "regnety_002"),
    *("pvt_tiny", "pvt_v2_b0", "nextvit_small"),
}


def tiered(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Values of a parameter, such as names of models, those that are not in `default` marked slow."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in values]
