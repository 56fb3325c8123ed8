"""The training source beside one or several evaluation sources."""

import pathlib

import pytest
from PIL import Image

from halvit_jax.data.sources import open_sources


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes, one image each in train, val and new."""
    for path in (tmp_path / split / name / "1.png" for split in ("train", "val", "new") for name in ("cat", "dog")):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path


def test_several_evaluation_sets_are_opened_by_name(digits_dir: pathlib.Path, root: pathlib.Path) -> None:
    evals = ("few=:test[:10]+test[20:30]", "train=digits:train")
    train, sources = open_sources("digits", str(digits_dir), "", "train", "", "test", evals)
    assert train.info.num_examples == 1433
    sizes = {key: source.info.num_examples for key, source in sources.items()}
    assert list(sizes.items()) == [("eval", 364), ("eval_few", 20), ("eval_train", 1433)]
    _, sources = open_sources("folder", "", str(root), "train", "", "val", ("new=:new",))
    assert list(sources) == ["eval", "eval_new"]


def test_an_evaluation_set_that_is_not_there_is_named_with_its_field(digits_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.evals v2=: data\.name='imagenet_v2' is not prepared in"):
        open_sources("digits", str(digits_dir), "", "train", "", "test", ("v2=imagenet_v2:test",))
    with pytest.raises(ValueError, match=r"^data\.eval_split='val': split 'val' of data\.name='digits' is unknown"):
        open_sources("digits", str(digits_dir), "", "train", "", "val")
    with pytest.raises(ValueError, match=r"data\.evals holds 'test'; write it name="):
        open_sources("digits", str(digits_dir), "", "train", "", "test", ("test",))


@pytest.mark.parametrize(
    ("split", "evals", "field"), [("val", (), r"data\.eval_split='val'"), ("new", ("b=:val",), "b=")]
)
def test_classes_of_only_one_set_are_named(root: pathlib.Path, split: str, evals: tuple[str, ...], field: str) -> None:
    for name in ("eel", *(f"x{i}" for i in range(6))):
        (root / "val" / name).mkdir()
        Image.new("RGB", (8, 8)).save(root / "val" / name / "1.png")
    message = rf"{field} .* must have the same classes; only one of them has eel, x0, x1, x2, x3 and 2 more"
    with pytest.raises(ValueError, match=message):
        open_sources("folder", "", str(root), "train", "", split, evals)


def test_a_root_is_for_folders(digits_dir: pathlib.Path, root: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data.root='/.*' is for data.name='folder', and data.name='digits'"):
        open_sources("digits", str(digits_dir), str(root), "train", "digits", "test")
