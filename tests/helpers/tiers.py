"""What the default tier takes, so that it stays under ten minutes; the tests of the rest are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from halvit_jax.models import FAMILIES

CORE = {"deit_tiny", "halvit_tiny", "resnet50", "halvit_resnet50", "shvit_s1"}
# Of every family one, in most the first of its sizes, and one with hallucinated maps and compact layers.
SMALLEST = [family.sizes for family in FAMILIES if not family.sizes.keys() & CORE]
KINDS = CORE | {"deit_tiny_hc"} | {next(iter(sizes)) for sizes in SMALLEST}


def tiered(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Values of a parameter, such as names of models, those that are not in `default` marked slow."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in values]
