"""Further evaluation sets (`data.evals`)."""

import re
from collections.abc import Sequence
from typing import NamedTuple

ENTRY = re.compile(r"(?P<key>\w+)=(?P<name>[^=]*):(?P<split>(?:[^:=\[\]]|\[[^\]]*\])+)")


class EvalSet(NamedTuple):
    """A TFDS data set ("": that of `data.name`) and its split."""

    name: str
    split: str


def parse_evals(entries: Sequence[str]) -> dict[str, EvalSet]:
    """From ("v2=imagenet_v2:test",) to {"v2": EvalSet("imagenet_v2", "test")}.

    Raises:
        ValueError: an entry of another form, or two of one name.
    """
    sets: dict[str, EvalSet] = {}
    for entry in entries:
        found = ENTRY.fullmatch(entry)
        if found is None:
            raise ValueError(f"data.evals holds {entry!r}; write it name=tfds_name:split, e.g. v2=imagenet_v2:test")
        if found["key"] in sets:
            raise ValueError(f"data.evals holds {found['key']}= twice; give each set its own name")
        sets[found["key"]] = EvalSet(found["name"], found["split"])
    return sets
