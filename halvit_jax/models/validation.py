"""Checks of a model's fields; the errors name the fields to change."""

from collections.abc import Collection

import jax

from halvit_jax.layers.attention import HALLUCINATE


def check_choice(field: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"model.{field}={value!r} is not one of {', '.join(allowed)}")


def check_divides(field: str, value: int, whole_field: str, whole: int) -> None:
    """Raise a ValueError unless both are positive and `value` divides `whole`."""
    if value < 1 or whole < 1 or whole % value:
        raise ValueError(f"model.{field}={value} does not divide model.{whole_field}={whole}; change one of them")


def check_rate(field: str, value: float) -> None:
    """Raise a ValueError unless `value` is a probability below 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"model.{field}={value} must lie in [0, 1)")


def check_channels(images: jax.Array, channels: int) -> None:
    """Raise a ValueError unless images [b, h, w, c] have so many channels."""
    if images.shape[-1] != channels:
        raise ValueError(f"images of {images.shape[-1]} channels for a model built for {channels}; set in_channels")


def check_compact(real_heads: float, hallucinate: str, ffn_rank: float, ffn_branches: int) -> None:
    """Raise a ValueError unless these fields of hallucinated attention and compact FFNs are valid."""
    for field, value in {"real_heads": real_heads, "ffn_rank": ffn_rank}.items():
        if not 0.0 < value <= 1.0:
            raise ValueError(f"model.{field}={value} must lie in (0, 1]")
    check_choice("hallucinate", hallucinate, HALLUCINATE)
    if ffn_branches < 1:
        raise ValueError(f"model.ffn_branches={ffn_branches} must be at least 1")
