"""What every model keeps to, whatever its family; the checks are in helpers/contract.py."""

import pytest
from helpers import contract
from helpers.tiers import CORE, KINDS, tiered

from halvit_jax.models import list_models

ALL = tiered(list_models(), KINDS)
RESIDUALS = ["deit_tiny", "mini_deit_tiny", "swin_tiny", "mini_swin_tiny", "pvt_tiny", "pvt_v2_b0"]
SLOWER = tiered(list_models(), CORE)  # checks that compile a gradient or two types
SLOWEST = tiered(list_models(), {"halvit_tiny", "pvt_tiny", "shvit_s1"})  # checks that compile several programs


@pytest.mark.parametrize("name", ALL)
def test_logits_are_float32_and_finite(name: str) -> None:
    contract.check_logits_are_float32_and_finite(name)


@pytest.mark.parametrize("name", SLOWER)
def test_variables_are_float32_in_any_compute_dtype(name: str) -> None:
    contract.check_variables_are_float32_in_any_compute_dtype(name)


@pytest.mark.parametrize("name", SLOWER)
def test_images_of_other_channels_change_the_first_kernel_alone(name: str) -> None:
    contract.check_images_of_other_channels_change_the_first_kernel_alone(name)


@pytest.mark.parametrize("name", SLOWEST)
def test_every_parameter_learns(name: str) -> None:
    contract.check_every_parameter_learns(name)


@pytest.mark.parametrize("name", SLOWER)
def test_bfloat16_is_close_to_float32(name: str) -> None:
    contract.check_bfloat16_is_close_to_float32(name)


@pytest.mark.parametrize("name", tiered(RESIDUALS, {"deit_tiny", "pvt_tiny"}))
def test_the_residual_is_float32_where_the_field_says_so(name: str) -> None:
    contract.check_the_residual_is_float32_where_the_field_says_so(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("deit_tiny", 64), ("swin_tiny", 112), ("pvt_tiny", 64)])
def test_a_float32_residual_is_closer_to_float32(name: str, size: int) -> None:
    contract.check_a_float32_residual_is_closer_to_float32(name, size)


@pytest.mark.parametrize("name", SLOWER)
def test_another_resolution_and_no_head(name: str) -> None:
    contract.check_another_resolution_and_no_head(name)


@pytest.mark.parametrize("name", SLOWEST)
def test_features_of_rectangles(name: str) -> None:
    contract.check_features_of_rectangles(name)


@pytest.mark.parametrize("name", SLOWER)
def test_frozen_norms_keep_their_averages(name: str) -> None:
    contract.check_frozen_norms_keep_their_averages(name)


@pytest.mark.parametrize("name", ALL)
def test_remat_changes_no_parameter_path(name: str) -> None:
    contract.check_remat_changes_no_parameter_path(name)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_partition_rule_to_shard_it(name: str) -> None:
    contract.check_every_parameter_has_a_partition_rule(name)


@pytest.mark.parametrize("name", ALL)
def test_blocks_can_be_captured(name: str) -> None:
    contract.check_blocks_can_be_captured(name)


@pytest.mark.parametrize("name", SLOWER)
def test_fold_keeps_the_logits(name: str) -> None:
    contract.check_fold_keeps_the_logits(name)


def test_no_check_of_the_contract_is_left_out() -> None:
    written = {
        name.removeprefix("test_").removesuffix("_to_shard_it") for name in globals() if name.startswith("test_")
    }
    assert contract.CHECKS.keys() <= written
