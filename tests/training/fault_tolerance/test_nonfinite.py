import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gcs_server import Server

from halvit_jax import storage
from halvit_jax.training.fault_tolerance.nonfinite import (
    NotFiniteError,
    finite_flags,
    raise_if_not_finite,
    write_bundle,
)


def _parts(**changed: float) -> dict:
    values = {"loss": 1.0, "weight": 2.0, "mean": 3.0, "moment": 4.0} | changed
    return {
        "loss": jnp.asarray(values["loss"]),
        "gradient": {"a": {"kernel": jnp.array([0.0, values["weight"]])}, "b": jnp.ones(3)},
        "model_state": {"mean": jnp.array([values["mean"]], jnp.bfloat16), "count": jnp.array([1])},
        "opt_state": (jnp.array([values["moment"]]),),
    }


def test_the_last_batches_of_a_run_in_a_bucket_are_written_there(server: Server) -> None:
    folder = storage.parse(f"{server.url}/run/debug/step_3")
    finite = finite_flags(_parts(loss=float("nan")))
    write_bundle(folder, 3, finite, {3: {"image": jnp.arange(4.0)}})
    report = json.loads((folder / "report.json").read_text())
    assert report == {"step": 3, "not_finite": ["loss"], "batches": [3]}
    with storage.local_copy(folder / "batch_3_0.npz") as copy:
        np.testing.assert_array_equal(np.load(copy)["image"], np.arange(4.0))


def test_nan_flags_cover_every_floating_array_and_pass_where_all_are_finite() -> None:
    finite = finite_flags(_parts())
    assert sorted(finite) == ["gradient/a/kernel", "gradient/b", "loss", "model_state/mean", "opt_state/0"]
    raise_if_not_finite(3, finite)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("where", "named"),
    [("loss", "loss"), ("weight", "gradient/a/kernel"), ("mean", "model_state/mean"), ("moment", "opt_state/0")],
)
def test_nan_and_infinite_arrays_are_named(where: str, named: str, bad: float) -> None:
    with pytest.raises(NotFiniteError, match=f"^not finite at step 7: {named}$"):
        raise_if_not_finite(7, finite_flags(_parts(**{where: bad})))


def test_of_several_nan_arrays_the_loss_is_named_first_and_the_rest_counted() -> None:
    nan = float("nan")
    with pytest.raises(NotFiniteError, match=r"step 7: loss, gradient/a/kernel, model_state/mean, opt_state/0$"):
        raise_if_not_finite(7, finite_flags(_parts(loss=nan, weight=nan, mean=nan, moment=nan)))
    with pytest.raises(NotFiniteError, match=r"x004 and 20 more$"):
        raise_if_not_finite(7, {f"x{i:03}": jnp.asarray(False) for i in range(25)})
