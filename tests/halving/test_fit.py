"""The fit of one layer: what it lowers, and that it can be stopped and split over devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from halvit_jax.halving import fit as fitting
from halvit_jax.layers.ffn import TiedMlp
from halvit_jax.training.sharding import BATCH, make_mesh

LAYER = functools.partial(fitting.normed, nn.LayerNorm(), TiedMlp(6, 12))
FIT = {"steps": 120, "batch": 32, "learning_rate": 1e-2, "seed": 3}
Data = tuple[Any, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def data() -> Data:
    """Parameters to start from, and inputs and targets of others near them."""
    rng = np.random.default_rng(0)

    def made() -> Any:
        module = {"tied": {"kernel": rng.standard_normal((6, 12))}, "hidden_bias": np.zeros(12), "bias": np.zeros(6)}
        tree = {"norm": {"scale": rng.uniform(0.5, 1.5, 6), "bias": np.zeros(6)}, "module": module}
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)

    inputs = rng.standard_normal((500, 6)).astype(np.float32)
    return made(), inputs, np.asarray(LAYER(made(), inputs))


def test_the_error_is_that_of_all_tokens(data: Data) -> None:
    start, inputs, targets = data
    found = fitting.relative_error(LAYER, start, inputs, targets, batch=64)
    rest = np.asarray(LAYER(start, inputs)) - targets
    assert found == pytest.approx(np.sum(rest**2) / np.sum((targets - targets.mean(0)) ** 2), rel=1e-5)
    assert fitting.relative_error(LAYER, start, inputs, np.asarray(LAYER(start, inputs)), batch=64) < 1e-12


def test_the_fit_lowers_the_error_and_repeats(data: Data) -> None:
    start, inputs, targets = data
    fitted = fitting.fit(LAYER, start, inputs, targets, **FIT)
    errors = [fitting.relative_error(LAYER, each, inputs, targets, batch=64) for each in (start, fitted)]
    assert errors[1] < 0.3 * errors[0]
    again = fitting.fit(LAYER, start, inputs, targets, **FIT)
    jax.tree.map(np.testing.assert_array_equal, fitted, again)
    other = fitting.fit(LAYER, start, inputs, targets, **FIT | {"seed": 4})
    assert not np.array_equal(other["module"]["bias"], fitted["module"]["bias"])


def stop_after(calls: int) -> Callable[[], bool]:
    answers = iter([False] * calls + [True])
    return lambda: next(answers)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_stopped_fit_goes_on_to_the_same_values(data: Data, calls: int) -> None:
    start, inputs, targets = data
    whole = fitting.fit(LAYER, start, inputs, targets, **FIT)
    with pytest.raises(fitting.Stopped) as stopped:
        fitting.fit(LAYER, start, inputs, targets, **FIT, stop=stop_after(calls))
    assert stopped.value.state.step == fitting.CHUNK * (calls + 1)
    rest = fitting.fit(LAYER, stopped.value.state, inputs, targets, **FIT)
    jax.tree.map(np.testing.assert_array_equal, whole, rest)


def test_the_fit_over_eight_devices_is_that_of_one(data: Data) -> None:
    start, inputs, targets = data
    sharding = NamedSharding(make_mesh(fsdp=2), BATCH)
    assert len(sharding.device_set) == 8
    one, eight = (fitting.fit(LAYER, start, inputs, targets, **FIT, sharding=each) for each in (None, sharding))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), one, eight)


def test_a_fit_of_no_steps_is_its_start(data: Data) -> None:
    start, inputs, targets = data
    jax.tree.map(np.testing.assert_array_equal, fitting.fit(LAYER, start, inputs, targets, **FIT | {"steps": 0}), start)
