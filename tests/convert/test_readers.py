"""Safetensors: what is read and written, and what lying and damaged files are answered with."""

import contextlib
import json
import pathlib
import pickle
import random
import struct
import types
from typing import Any

import numpy as np
import pytest
from helpers.gcs_server import Server
from helpers.memory import peak

from halvit_jax.convert import readers

MEGABYTE = 2**20


def lie(path: pathlib.Path, header: Any, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", readers.DTYPES.values(), ids=str)
def test_safetensors_come_back_as_they_were(dtype: np.dtype, tmp_path: pathlib.Path) -> None:
    arrays = {
        "b": (np.arange(6) - 3 * (dtype.kind != "u")).reshape(3, 2).astype(dtype),
        "a/b": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).astype(dtype),
        "scalar": np.array(3, dtype),
        "odd": np.ones(1, np.uint8),
    }
    path = tmp_path / "x.safetensors"
    readers.write(path, arrays, {"model": "net", "note": 'é"\n'})
    back = readers.read(path)
    assert back.metadata == {"model": "net", "note": 'é"\n'}
    assert back.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back.arrays[name].dtype, back.arrays[name].shape) == (array.dtype, array.shape)
        assert back.arrays[name].tobytes() == array.tobytes()
    assert [other.name for other in tmp_path.iterdir()] == ["x.safetensors"]


def test_arrays_begin_where_their_type_may(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    readers.write(path, {"a": np.ones(3, np.uint8), "b": np.ones(2, np.float32), "c": np.zeros((), np.int64)}, {})
    text = path.read_bytes()
    length = struct.unpack("<Q", text[:8])[0]
    header = json.loads(text[8 : 8 + length])
    assert length % 8 == 0
    assert "__metadata__" not in header
    assert {name: told["data_offsets"] for name, told in header.items()} == {"c": [0, 8], "b": [8, 16], "a": [16, 19]}
    assert len(text) == 8 + length + 19


def test_a_weight_file_in_a_bucket_is_read_and_none_is_written_there(tmp_path: pathlib.Path, server: Server) -> None:
    arrays = {"a": np.arange(6.0, dtype=np.float32)}
    readers.write(tmp_path / "x.safetensors", arrays, {"kind": "test"})
    server.bucket.put("weights/x.safetensors", (tmp_path / "x.safetensors").read_bytes())
    found = readers.read(f"{server.url}/weights/x.safetensors")
    np.testing.assert_array_equal(found.arrays["a"], arrays["a"])
    assert found.metadata == {"kind": "test"}
    with pytest.raises(ValueError, match=r"gs://bucket/weights/y.safetensors is not a file"):
        readers.read(f"{server.url}/weights/y.safetensors")
    with pytest.raises(ValueError, match=r"gs://bucket/weights/y.safetensors must be a local path"):
        readers.write(f"{server.url}/weights/y.safetensors", arrays, {})


def test_what_cannot_be_written_leaves_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"x.npz must end in .safetensors"):
        readers.write(tmp_path / "x.npz", {}, {})
    for array in (np.array(["text"]), np.zeros((0, 3), np.float32), np.zeros(2, bool)):
        with pytest.raises(ValueError, match=r"a of .* is empty or its type is not one of float64, float32"):
            readers.write(tmp_path / "x.safetensors", {"a": array}, {})
    with pytest.raises(FileNotFoundError):
        readers.write(tmp_path / "none" / "x.safetensors", {"a": np.zeros(1)}, {})

    class Broken(np.ndarray):
        def tobytes(self, *_: Any) -> bytes:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        readers.write(tmp_path / "x.safetensors", {"a": np.zeros(1).view(Broken)}, {})
    assert list(tmp_path.iterdir()) == []


LIES = {
    "beyond the file": ({"a": entry([2], [0, 80])}, b"12345678", "offsets [0, 80], which are not two places among 8"),
    "overlapping": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"x" * 12, "b starts at byte 4"),
    "the same twice": ({"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, b"x" * 8, "b starts at byte 0"),
    "a gap": ({"a": entry([2], [4, 12])}, b"x" * 12, "a starts at byte 4, but the arrays before it end at 0"),
    "left-over bytes": ({"a": entry([2], [0, 8])}, b"x" * 12, "its arrays end at byte 8 of 12"),
    "cut off": ({"a": entry([2], [0, 8])}, b"x" * 7, "not two places among 7 bytes"),
    "backwards": ({"a": entry([2], [8, 0])}, b"x" * 8, "offsets [8, 0]"),
    "negative offset": ({"a": entry([2], [-8, 0])}, b"x" * 8, "offsets [-8, 0]"),
    "negative shape": ({"a": entry([-2], [0, 8])}, b"x" * 8, "shape [-2]"),
    "two negatives": ({"a": entry([-2, -1], [0, 8])}, b"x" * 8, "shape [-2, -1]"),
    "huge shape": ({"a": entry([2**62, 8], [0, 8])}, b"x" * 8, "does not fill the bytes [0, 8]"),
    "huge shape of nothing": ({"a": entry([0, 2**62], [0, 0])}, b"", "numbers above 0"),
    "too many axes": ({"a": entry([1] * 99, [0, 4])}, b"x" * 4, "at most eight numbers"),
    "a shape of floats": ({"a": entry([2.0], [0, 8])}, b"x" * 8, "shape [2.0]"),
    "a shape of truths": ({"a": entry([True, 2], [0, 8])}, b"x" * 8, "shape [True, 2]"),
    "a shape of text": ({"a": entry("2", [0, 8])}, b"x" * 8, "shape '2'"),
    "three offsets": ({"a": entry([2], [0, 8, 8])}, b"x" * 8, "offsets [0, 8, 8]"),
    "unknown type": ({"a": entry([2], [0, 8], "F33")}, b"x" * 8, "type 'F33', which is not one of F64, F32"),
    "a type of no kind": ({"a": entry([2], [0, 8], ["F32"])}, b"x" * 8, "type ['F32']"),
    "another key": ({"a": entry([2], [0, 8]) | {"code": 1}}, b"x" * 8, "not described by dtype, shape"),
    "no entry": ({"a": 3}, b"", "a is not described by dtype, shape"),
    "metadata of numbers": ({"__metadata__": {"a": 3}}, b"", "__metadata__ is not made of strings"),
    "metadata of no kind": ({"__metadata__": "x"}, b"", "__metadata__ is not made of strings"),
    "a name twice": (b'{"a":{"dtype":"F32"},"a":{}}', b"", "names a twice"),
    "no object": (b"[]", b"", "no JSON object"),
    "no JSON": (b'{"a":', b"", "not JSON (JSONDecodeError)"),
    "no text": (b'{"\xff":1}', b"", "not JSON (UnicodeDecodeError)"),
    "a deep list": (b"[" * 100_000, b"", "not JSON (RecursionError)"),
    "a long number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not JSON (ValueError)"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused(kind: str, tmp_path: pathlib.Path) -> None:
    header, data, why = LIES[kind]
    path = lie(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=r"x.safetensors is not a valid safetensors file: ") as error:
        readers.read(path)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert peak(readers.read, path) < MEGABYTE


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is truncated"),
        (b"\x02\0\0\0\0\0\0\0{", "it is truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "its header would be 9223372036854775808 bytes long"),
        (struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 1), "its header would be 1048577 bytes long"),
        (pickle.dumps({"a": 1}), "it looks like a pickle"),
        (b"PK\x03\x04 an archive of torch.save", "it looks like a pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, why: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.safetensors is not a valid safetensors file: ") as error:
        readers.read(path)
    assert why in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lie(tmp_path / "x.safetensors", {"a": entry([2], [0, 8])}, b"x" * 4)
    told = types.SimpleNamespace(st_size=path.stat().st_size + 4)
    monkeypatch.setattr(readers.os, "fstat", lambda _: told)
    with pytest.raises(ValueError, match="it became shorter while it was read"):
        readers.read(path)


def test_mutated_headers_are_read_or_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays = {f"layer{i}/kernel": np.full((2, i), i, np.float32) for i in range(1, 4)}
    readers.write(path, arrays, {"model": "net", "fields": "{}"})
    sound = path.read_bytes()
    end = 8 + struct.unpack("<Q", sound[:8])[0]
    rng = random.Random(0)
    pieces = (b"[", b"]", b"{", b"}", b'"', b",", b"-", b"9" * 30, b"0", b"e", b"null", b"\xff", b"F64", b"\0")
    read, most = 0, 0
    for _ in range(200):
        text = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(end)
            text[at : at + rng.randint(0, 3)] = rng.choice((*pieces, bytes([rng.randrange(256)])))
        if rng.random() < 0.5:  # lengthen or shorten the header's own number with it
            text[:8] = struct.pack("<Q", max(0, end - 8 + len(text) - len(sound)))
        path.write_bytes(bytes(text))
        most = max(most, peak(readers.read, path))
        with contextlib.suppress(ValueError):  # of all errors, this one only
            readers.read(path)
            read += 1
    assert 0 < read < 50  # a changed letter of a name is no harm
    assert most < MEGABYTE


def test_reading_takes_the_files_size_once(tmp_path: pathlib.Path) -> None:
    arrays = {f"a{i}": np.full(MEGABYTE, i, np.float32) for i in range(4)}
    readers.write(tmp_path / "x.safetensors", arrays, {})
    np.savez(tmp_path / "x.npz", **arrays)
    for name in ("x.safetensors", "x.npz"):
        path = tmp_path / name
        assert peak(readers.read, path) < 1.2 * path.stat().st_size
        assert np.array_equal(readers.read(path).arrays["a3"], arrays["a3"])
