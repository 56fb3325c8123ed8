"""A narrow teacher and images for it."""

import numpy as np
import pytest
from helpers.halving import Teacher, random_deit


@pytest.fixture(scope="session")
def untied() -> Teacher:
    """A random DeiT."""
    return random_deit()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((40, 8, 8, 3)).astype(np.float32)
