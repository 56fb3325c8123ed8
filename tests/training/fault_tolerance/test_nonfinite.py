import jax.numpy as jnp
import pytest

from halvit_jax.training.fault_tolerance.nonfinite import NotFiniteError, finite_flags, raise_if_not_finite


def _parts(**changed: float) -> dict:
    values = {"loss": 1.0, "weight": 2.0, "mean": 3.0, "moment": 4.0} | changed
    return {
        "loss": jnp.asarray(values["loss"]),
        "gradient": {"a": {"kernel": jnp.array([0.0, values["weight"]])}, "b": jnp.ones(3)},
        "model_state": {"mean": jnp.array([values["mean"]], jnp.bfloat16), "count": jnp.array([1])},
        "opt_state": (jnp.array([values["moment"]]),),
    }


def test_flags_cover_every_floating_array_and_check_passes_where_all_are_finite() -> None:
    finite = finite_flags(_parts())
    assert sorted(finite) == ["gradient/a/kernel", "gradient/b", "loss", "model_state/mean", "opt_state/0"]
    raise_if_not_finite(3, finite)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("where", "named"),
    [("loss", "loss"), ("weight", "gradient/a/kernel"), ("mean", "model_state/mean"), ("moment", "opt_state/0")],
)
def test_what_is_not_finite_is_named(where: str, named: str, bad: float) -> None:
    with pytest.raises(NotFiniteError, match=f"^not finite at step 7: {named}$"):
        raise_if_not_finite(7, finite_flags(_parts(**{where: bad})))


def test_the_loss_is_named_first_then_gradients_and_of_many_the_rest_is_counted() -> None:
    nan = float("nan")
    with pytest.raises(NotFiniteError, match=r"step 7: loss, gradient/a/kernel, model_state/mean, opt_state/0$"):
        raise_if_not_finite(7, finite_flags(_parts(loss=nan, weight=nan, mean=nan, moment=nan)))
    with pytest.raises(NotFiniteError, match=r"x004 and 20 more$"):
        raise_if_not_finite(7, {f"x{i:03}": jnp.asarray(False) for i in range(25)})
