import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.training.fault_tolerance.grad_spikes import Limit, make_limit
from halvit_jax.training.fault_tolerance.nonfinite import NotFiniteError, check, flags


def _parts(**changed: float) -> dict:
    values = {"loss": 1.0, "weight": 2.0, "mean": 3.0, "moment": 4.0} | changed
    return {
        "loss": jnp.asarray(values["loss"]),
        "gradient": {"a": {"kernel": jnp.array([0.0, values["weight"]])}, "b": jnp.ones(3)},
        "model_state": {"mean": jnp.array([values["mean"]], jnp.bfloat16), "count": jnp.array([1])},
        "opt_state": (jnp.array([values["moment"]]),),
    }


def test_flags_cover_every_floating_array_and_check_passes_where_all_are_finite() -> None:
    finite = flags(_parts())
    assert sorted(finite) == ["gradient/a/kernel", "gradient/b", "loss", "model_state/mean", "opt_state/0"]
    check(3, finite)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("where", "named"),
    [("loss", "loss"), ("weight", "gradient/a/kernel"), ("mean", "model_state/mean"), ("moment", "opt_state/0")],
)
def test_what_is_not_finite_is_named(where: str, named: str, bad: float) -> None:
    with pytest.raises(NotFiniteError, match=f"^not finite at step 7: {named}$"):
        check(7, flags(_parts(**{where: bad})))


def test_the_loss_is_named_first_then_gradients_and_of_many_the_rest_is_counted() -> None:
    nan = float("nan")
    with pytest.raises(NotFiniteError, match=r"step 7: loss, gradient/a/kernel, model_state/mean, opt_state/0$"):
        check(7, flags(_parts(loss=nan, weight=nan, mean=nan, moment=nan)))
    with pytest.raises(NotFiniteError, match=r"x004 and 20 more$"):
        check(7, {f"x{i:03}": jnp.asarray(False) for i in range(25)})


def _judge(limit: Limit, norms: list[float]) -> tuple[list[bool], list[bool], dict]:
    memory, skipped, too_many = limit.init(), [], []
    judge = jax.jit(limit.judge)
    for step, norm in enumerate(norms):
        verdict = judge(memory, jnp.asarray(norm), jnp.asarray(step))
        memory = verdict.memory
        skipped.append(bool(verdict.skip))
        too_many.append(bool(verdict.too_many))
    return skipped, too_many, memory


def test_a_spike_is_left_out_and_does_not_move_what_is_usual() -> None:
    norms = [1.0, 1.1, 100.0, 0.9, float("nan"), float("inf"), 1.0]
    skipped, too_many, memory = _judge(Limit(5.0, most=10, window=100), norms)
    assert skipped == [False, False, True, False, True, True, False]
    assert not any(too_many)
    usual = 1.0
    for norm in (1.1, 0.9, 1.0):
        usual = 0.98 * usual + 0.02 * norm
    np.testing.assert_allclose(memory["norm"], usual, rtol=1e-6)


def test_more_than_the_allowed_number_in_a_window_are_too_many() -> None:
    spikes = [1.0, 9.0, 1.0, 9.0, 1.0, 9.0]
    assert _judge(Limit(3.0, most=2, window=5), spikes)[1] == [False] * 5 + [True]
    assert _judge(Limit(3.0, most=2, window=4), spikes)[1] == [False] * 6  # the first has left the window
    assert _judge(Limit(3.0, most=3, window=5), spikes)[1] == [False] * 6


def test_off_it_remembers_nothing_and_wrong_values_are_refused() -> None:
    assert make_limit(norm_factor=0.0, max_skipped=10, window=1000).init() == {}
    with pytest.raises(ValueError, match=r"skip_updates.norm_factor=0.5 must be 0 \(off\) or above 1"):
        make_limit(norm_factor=0.5, max_skipped=10, window=1000)
    for field in ("max_skipped", "window"):
        with pytest.raises(ValueError, match=f"skip_updates.{field}=0 must be at least 1"):
            make_limit(**{"norm_factor": 3.0, "max_skipped": 1, "window": 1} | {field: 0})
