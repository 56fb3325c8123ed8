"""The variants of a config file: `--config=configs/name.py:variant[,variant]`."""

from collections.abc import Collection


def choose(given: str, *groups: Collection[str]) -> tuple[str, ...]:
    """One name of each group: the one in `given`, or else the group's first; "" as the first means no variant.

    Raises:
        ValueError: a name of no group, or two of one group.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    allowed = ", ".join(name for group in groups for name in group if name)
    for name in names:
        if not any(name in group for group in groups):
            raise ValueError(f"variant {name!r} is not one of {allowed or 'this file, which has none'}")
    chosen = []
    for group in groups:
        own = [name for name in names if name in group]
        if len(own) > 1:
            raise ValueError(f"variants {' and '.join(own)} exclude each other; all: {allowed}")
        chosen.append(own[0] if own else next(iter(group)))
    return tuple(chosen)
