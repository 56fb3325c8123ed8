"""The engine of rules, on a table of a few lines."""

from typing import Any

import numpy as np
import pytest

from halvit_jax.convert.engine import (
    LAYOUTS,
    Rule,
    batch_norm,
    check_tree,
    conv,
    dense,
    from_torch_arrays,
    layer_norm,
    to_torch,
)

RULES = (*dense("blocks.{i}.fc", "block{i}/ffn"), *conv("stem.0", "stem/conv"), *batch_norm("stem.1", "stem/norm"))
WANTED = {
    "params/block0/ffn/kernel": (2, 3),
    "params/block0/ffn/bias": (3,),
    "params/block1/ffn/kernel": (3, 4),
    "params/block1/ffn/bias": (4,),
    "params/stem/conv/kernel": (3, 3, 5, 7),
    "params/stem/norm/scale": (7,),
    "params/stem/norm/bias": (7,),
    "batch_stats/stem/norm/mean": (7,),
    "batch_stats/stem/norm/var": (7,),
}


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    shapes = {
        "blocks.0.fc.weight": (3, 2),
        "blocks.0.fc.bias": (3,),
        "blocks.1.fc.weight": (4, 3),
        "blocks.1.fc.bias": (4,),
        "stem.0.weight": (7, 5, 3, 3),
        "stem.1.weight": (7,),
        "stem.1.bias": (7,),
        "stem.1.running_mean": (7,),
        "stem.1.running_var": (7,),
    }
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return state | {"stem.1.num_batches_tracked": np.zeros((), np.int64)}


def test_one_table_reads_both_ways(state: dict[str, np.ndarray]) -> None:
    arrays = from_torch_arrays("net", RULES, state, WANTED)
    assert {path: array.shape for path, array in arrays.items()} == WANTED
    assert arrays["params/block1/ffn/kernel"][2, 3] == state["blocks.1.fc.weight"][3, 2]
    assert arrays["params/stem/conv/kernel"][0, 1, 2, 3] == state["stem.0.weight"][3, 2, 0, 1]
    back = to_torch(RULES, arrays)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)


@pytest.mark.parametrize(
    ("layout", "shape", "ours"),
    [
        ("same", (3,), (3,)),
        ("linear", (3, 2), (2, 3)),
        ("conv", (5, 4, 2, 3), (2, 3, 4, 5)),
        ("pointwise", (5, 4, 1, 1), (4, 5)),
        ("token", (1, 1, 6), (6,)),
        ("position", (1, 4, 6), (4, 6)),
        ("transposed", (2, 3, 4, 5), (4, 5, 2, 3)),
    ],
)
def test_a_layout_has_an_inverse(layout: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    there = LAYOUTS[layout].to_jax(array)
    assert there.shape == ours
    assert np.array_equal(LAYOUTS[layout].to_torch(there), array)
    assert np.shares_memory(there, array)


@pytest.mark.parametrize(
    ("layout", "shape", "ours", "background"),
    [
        ("pooled", (3, 98), (98, 3), 0),
        ("background_first", (4, 6), (6, 4), 0),
        ("background_first_bias", (4,), (4,), 0),
        ("background_boxes", (12, 6), (6, 8), 4),
        ("background_boxes_bias", (12,), (8,), 4),
        ("background_masks", (3, 2, 1, 1), (1, 1, 2, 2), 1),
        ("background_masks_bias", (3,), (2,), 1),
    ],
)
def test_a_layout_of_detectors_has_an_inverse_but_for_the_rows_of_the_background(
    layout: str, shape: tuple[int, ...], ours: tuple[int, ...], background: int
) -> None:
    array = np.arange(1, np.prod(shape) + 1).reshape(shape)
    array[:background] = 0
    there = LAYOUTS[layout].to_jax(array)
    assert there.shape == ours
    assert np.array_equal(LAYOUTS[layout].to_torch(there), array)


def test_every_layout_is_tested() -> None:
    tests = test_a_layout_has_an_inverse, test_a_layout_of_detectors_has_an_inverse_but_for_the_rows_of_the_background
    marks = [mark for test in tests for mark in test.pytestmark if mark.name == "parametrize"]
    assert {case[0] for mark in marks for case in mark.args[1]} == LAYOUTS.keys()


def test_numbers_are_the_same_on_both_sides() -> None:
    rule = Rule("layer{s}.{i}.bn", "params/stage{s}/block{i}/norm")
    assert rule.path("layer3.17.bn") == "params/stage3/block17/norm"
    assert rule.name("params/stage3/block17/norm") == "layer3.17.bn"
    for name in ("layer3.x.bn", "layer3.17.bn.weight", "layer3x17.bn", "layer٣.1.bn"):
        assert rule.path(name) is None


def test_old_files_count_no_updates(state: dict[str, np.ndarray]) -> None:
    del state["stem.1.num_batches_tracked"]
    assert from_torch_arrays("net", RULES, state, WANTED).keys() == WANTED.keys()


def test_what_follows_from_the_fields_is_neither_kept_nor_written(state: dict[str, np.ndarray]) -> None:
    rules = (*RULES, Rule("blocks.{i}.index", "params/block{i}/ffn/bias", "cache"))
    arrays = from_torch_arrays("net", rules, state | {"blocks.1.index": np.zeros((9, 9), np.int64)}, WANTED)
    assert to_torch(rules, arrays).keys() == state.keys()


def test_everything_that_is_wrong_is_reported_at_once(state: dict[str, Any]) -> None:
    del state["blocks.0.fc.weight"], state["stem.1.running_var"]
    state["blocks.2.fc.weight"] = state["head.bias"] = np.zeros(1, np.float32)
    state["stem.0.weight"] = np.zeros((7, 5, 1, 3), np.float32)
    state["blocks.1.fc.bias"] = np.zeros(4, np.float64)
    with pytest.raises(ValueError, match="these weights do not fit net") as error:
        from_torch_arrays("net", RULES, state, WANTED)
    for message in (
        "2 missing: blocks.0.fc.weight, stem.1.running_var",
        "2 unexpected: blocks.2.fc.weight, head.bias",
        "1 shape mismatch: stem.0.weight (is (7, 5, 1, 3), must be (7, 5, 3, 3))",
        "1 of a wrong type: blocks.1.fc.bias (is float64, must be float32 or float16 or bfloat16)",
    ):
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_rule_names_a_path_and_the_next_ones_are_understood() -> None:
    rules = (*layer_norm("norm", "norm"), *layer_norm("ln_f", "norm"))
    wanted = {"params/norm/scale": (2,), "params/norm/bias": (2,)}
    old = {"ln_f.weight": np.float32([1, 2]), "ln_f.bias": np.float32([3, 4])}
    arrays = from_torch_arrays("net", rules, old, wanted)
    assert to_torch(rules, arrays).keys() == {"norm.weight", "norm.bias"}
    with pytest.raises(ValueError, match=r"1 ambiguous: params/norm/bias \(is ln_f.bias and norm.bias\)$"):
        from_torch_arrays("net", rules, old | {"norm.bias": old["ln_f.bias"]}, wanted)


def test_a_counter_too_is_written_under_its_first_name_alone() -> None:
    rules = (*batch_norm("bn", "norm"), *batch_norm("old", "norm"))
    arrays = dict.fromkeys(("params/norm/scale", "batch_stats/norm/mean"), np.ones(2, np.float32))
    assert to_torch(rules, arrays).keys() == {"bn.weight", "bn.running_mean", "bn.num_batches_tracked"}


def test_a_name_with_two_places_is_ambiguous() -> None:
    rules = (Rule("w", "params/a"), Rule("w", "params/b"))
    wanted = {"params/a": (1,), "params/b": (1,)}
    with pytest.raises(ValueError, match=r"ambiguous: w \(is params/a and params/b\)"):
        from_torch_arrays("net", rules, {"w": np.zeros(1, np.float32)}, wanted)
    with pytest.raises(ValueError, match=r"ambiguous: w \(is params/b and another\)"):
        to_torch(rules, {path: np.zeros(1, np.float32) for path in wanted})


def test_a_path_without_a_rule_is_missing_both_ways() -> None:
    with pytest.raises(ValueError, match=r"1 missing: params/new \(no rule names it\)"):
        from_torch_arrays("net", RULES, {}, {"params/new": (1,)})
    with pytest.raises(ValueError, match=r"1 missing: params/new \(no rule names it\)"):
        to_torch(RULES, {"params/new": np.zeros(1, np.float32)})


def test_variables_of_another_model_are_refused_by_path() -> None:
    arrays = {path: np.zeros(shape, np.float32) for path, shape in WANTED.items()}
    check_tree("net", arrays, WANTED)
    del arrays["params/stem/norm/bias"]
    arrays["params/extra"] = np.zeros(1, np.float32)
    arrays["params/stem/norm/scale"] = np.zeros(6, np.float32)
    arrays["params/block0/ffn/bias"] = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="these variables do not fit net") as error:
        check_tree("net", arrays, WANTED)
    for message in (
        "1 missing: params/stem/norm/bias",
        "1 unexpected: params/extra",
        "1 shape mismatch: params/stem/norm/scale (is (6,), must be (7,))",
        "1 of a wrong type: params/block0/ffn/bias (is int32,",
    ):
        assert message in str(error.value)


def test_a_rule_that_reads_one_way_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a.\{i\} and b do not name the same numbers"):
        Rule("a.{i}", "b")
    with pytest.raises(ValueError, match=r"layout 'diagonal' of a is not one of same, linear.*, counter, cache"):
        Rule("a", "b", "diagonal")
