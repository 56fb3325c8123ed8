"""Checks of a model's fields; what they raise names the fields to change."""

from collections.abc import Collection


def check_choice(field: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"model.{field}={value!r} is not one of {', '.join(allowed)}")


def check_divides(field: str, value: int, whole_field: str, whole: int) -> None:
    """Raise a ValueError unless both are positive and `value` divides `whole`."""
    if value < 1 or whole < 1 or whole % value:
        raise ValueError(f"model.{field}={value} does not divide model.{whole_field}={whole}; change one of them")
