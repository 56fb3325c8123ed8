import re

import pytest

from halvit_jax.data.evals import parse_evals


def test_further_evaluation_sets_are_named_with_data_set_and_split() -> None:
    entries = ("v2=imagenet_v2/matched-frequency:3.0.0:test", "first=digits:test[:10%]", "own=:val")
    assert parse_evals(entries) == {
        "v2": ("imagenet_v2/matched-frequency:3.0.0", "test"),
        "first": ("digits", "test[:10%]"),
        "own": ("", "val"),
    }
    assert parse_evals(()) == {}


@pytest.mark.parametrize("entry", ["imagenet_v2:test", "v2=imagenet_v2", "v 2=imagenet_v2:test", "v2=imagenet_v2:"])
def test_an_evaluation_set_of_another_form_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"data.evals holds {entry!r}; write it name=")):
        parse_evals((entry,))


def test_two_evaluation_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.evals holds v2= twice"):
        parse_evals(("v2=a:test", "v2=b:test"))
