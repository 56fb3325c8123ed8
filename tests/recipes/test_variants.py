import pytest

from halvit_jax.recipes.variants import choose


def test_variants_are_chosen_by_name_in_any_order() -> None:
    groups = (("s1", "s2"), ("", "distilled", "384"))
    assert choose("", *groups) == ("s1", "")
    assert choose("s2", *groups) == ("s2", "")
    assert choose("384,s2", *groups) == ("s2", "384")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("s3", "variant 's3' is not one of s1, s2, distilled, 384"),
        ("s2,distilled,384", "variants distilled and 384 exclude each other"),
        ("s1,s1", "variants s1 and s1 exclude each other"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_allowed_names(variant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(variant, ("s1", "s2"), ("", "distilled", "384"))


def test_a_file_without_variants_refuses_all() -> None:
    assert choose("") == ()
    with pytest.raises(ValueError, match="variant 's1' is not one of this file, which has none"):
        choose("s1")
