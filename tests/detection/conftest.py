"""Reference outputs of detection."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Case = Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]]


@pytest.fixture(scope="session")
def case(golden: pathlib.Path) -> Case:
    """`case(name)`: how a case was made, and its arrays."""

    def read(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        file = golden / "detection" / f"{name}.npz"
        return json.loads(file.with_suffix(".json").read_text()), dict(np.load(file))

    return read
