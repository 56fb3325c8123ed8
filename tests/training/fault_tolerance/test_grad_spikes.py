import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.training.fault_tolerance.grad_spikes import GradSpikeGuard, make_guard


def _decide(guard: GradSpikeGuard, norms: list[float]) -> tuple[list[bool], list[bool], dict]:
    state, skipped, too_many = guard.init(), [], []
    update = jax.jit(guard.update)
    for step, norm in enumerate(norms):
        decision = update(state, jnp.asarray(norm), jnp.asarray(step))
        state = decision.state
        skipped.append(bool(decision.skip))
        too_many.append(bool(decision.too_many))
    return skipped, too_many, state


def test_a_spike_is_skipped_and_does_not_move_the_usual_norm() -> None:
    norms = [1.0, 1.1, 100.0, 0.9, float("nan"), float("inf"), 1.0]
    skipped, too_many, state = _decide(GradSpikeGuard(5.0, max_skipped=10, window=100), norms)
    assert skipped == [False, False, True, False, True, True, False]
    assert not any(too_many)
    usual = 1.0
    for norm in (1.1, 0.9, 1.0):
        usual = 0.98 * usual + 0.02 * norm
    np.testing.assert_allclose(state["norm"], usual, rtol=1e-6)


def test_more_than_the_allowed_number_in_a_window_are_too_many() -> None:
    spikes = [1.0, 9.0, 1.0, 9.0, 1.0, 9.0]
    assert _decide(GradSpikeGuard(3.0, max_skipped=2, window=5), spikes)[1] == [False] * 5 + [True]
    assert (
        _decide(GradSpikeGuard(3.0, max_skipped=2, window=4), spikes)[1] == [False] * 6
    )  # the first has left the window
    assert _decide(GradSpikeGuard(3.0, max_skipped=3, window=5), spikes)[1] == [False] * 6


def test_off_the_guard_has_no_state_and_wrong_values_are_refused() -> None:
    assert make_guard(norm_factor=0.0, max_skipped=10, window=1000).init() == {}
    with pytest.raises(ValueError, match=r"skip_updates.norm_factor=0.5 must be 0 \(off\) or above 1"):
        make_guard(norm_factor=0.5, max_skipped=10, window=1000)
    for field in ("max_skipped", "window"):
        with pytest.raises(ValueError, match=f"skip_updates.{field}=0 must be at least 1"):
            make_guard(**{"norm_factor": 3.0, "max_skipped": 1, "window": 1} | {field: 0})
