import json
import pathlib
import re

import pytest

from halvit_jax.training.checkpoint import manifest
from halvit_jax.training.checkpoint.manifest import CorruptCheckpointError


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "12"
    (folder / "arrays").mkdir(parents=True)
    (folder / "metadata").write_text("{}")
    (folder / "arrays" / "a").write_bytes(bytes(range(256)))
    manifest.write(folder, 12)
    return folder


def test_a_sealed_folder_verifies_and_lists_its_files(folder: pathlib.Path) -> None:
    assert manifest.is_sealed(folder)
    assert sorted(manifest.verify(folder)["files"]) == ["arrays/a", "metadata"]
    assert sorted(path.name for path in folder.iterdir()) == ["arrays", manifest.NAME, "metadata"]


def test_unsealed_it_is_no_checkpoint(folder: pathlib.Path) -> None:
    manifest.unseal(folder)
    manifest.unseal(folder)
    assert not manifest.is_sealed(folder)
    with pytest.raises(CorruptCheckpointError, match=r"manifest.json is missing"):
        manifest.read(folder)


def test_a_changed_file_is_named_with_both_digests(folder: pathlib.Path) -> None:
    path = folder / "arrays" / "a"
    named = re.escape(str(path))
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(
        CorruptCheckpointError, match=rf"{named} has the digest [0-9a-f]{{16}}, expected [0-9a-f]{{16}}"
    ):
        manifest.verify(folder)
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=rf"{named} has 0 bytes, expected 256"):
        manifest.verify(folder)
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"{named} is missing"):
        manifest.verify(folder)


def test_the_manifest_itself_is_verified(folder: pathlib.Path) -> None:
    path = folder / manifest.NAME
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "body": {**whole["body"], "files": {}}}))
    with pytest.raises(CorruptCheckpointError, match=r"manifest.json has the digest"):
        manifest.verify(folder)
    for text in ("", "{}", "[]", "nonsense", '{"sha256": 1}'):
        path.write_text(text)
        with pytest.raises(CorruptCheckpointError, match=r"manifest.json cannot be read"):
            manifest.verify(folder)


def test_the_manifest_of_another_step_is_refused(folder: pathlib.Path) -> None:
    other = folder.rename(folder.parent / "13")
    with pytest.raises(CorruptCheckpointError, match="is of step 12, not of 13"):
        manifest.verify(other)
