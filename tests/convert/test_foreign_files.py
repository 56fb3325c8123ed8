"""Files that could run code or unpack to more than they log: pickles, npz archives, and PyTorch's own."""

import pathlib
import pickle
import struct
import sys
import types
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.memory import peak

from halvit_jax.convert import readers

MEGABYTE = 2**20


class Bomb:
    """A pickle of it writes a marker when it is loaded."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.pth.tar", "x.bin", "x.pkl", "x.npy", "x.safetensors", "x.npz"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_run(
    name: str, protocol: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    marker, path = tmp_path / "marker", tmp_path / name
    path.write_bytes(pickle.dumps({"a": Bomb(marker)}, protocol))
    with pytest.raises(ValueError, match=name) as error:
        readers.read(path)
    assert not marker.exists()
    assert "\n" not in str(error.value)
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the pickle would have written it


def test_objects_in_npz_are_refused(tmp_path: pathlib.Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.npz"
    np.savez(path, a=np.array([Bomb(marker)], dtype=object))
    with pytest.raises(
        ValueError, match=r"x.npz is not a valid npz file: a.npy holds objects, a pickle, .*safetensors"
    ):
        readers.read(path)
    assert not marker.exists()


def test_npz_comes_back_as_it_was(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.standard_normal((3, 4)), "f": np.asfortranarray(rng.standard_normal((2, 3))), "n": 3}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        back = readers.read(tmp_path / "x.npz").arrays
        assert back.keys() == arrays.keys()
        assert all(np.array_equal(back[name], array) for name, array in arrays.items())


def npy(shape: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    """A file of numpy.save with this in its header, whatever it says."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy("(2**40,)", b"1234"), "is not a valid npz file"),
        (npy(f"({2**40},)", b"1234"), "does not fit into its"),
        (npy("(-1,)", b"1234"), "does not fit into its"),
        (npy("(-1, -1)", b"1234"), "is not a valid npz file"),
        (npy("(3,)", b"1" * 4), "is truncated"),
        (npy("(1,)", b"1234", b"\x03\x00"), r"is of version \(3, 0\)"),
        (b"text", "is not a valid npz file"),
    ],
)
def test_a_lying_array_in_npz_is_refused(content: bytes, why: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=why):
        readers.read(path)
    assert peak(readers.read, path) < MEGABYTE


def test_a_bomb_and_a_double_in_npz_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(8 * MEGABYTE, np.uint8))
    assert peak(readers.read, path) < MEGABYTE
    with pytest.raises(ValueError, match="it unpacks to half as much again or more"):
        readers.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy("(1,)", b"1234"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy("(1,)", b"5678"))
    with pytest.raises(ValueError, match="it holds a twice"):
        readers.read(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"x.npz is not a valid npz file"):
        readers.read(path)


def test_what_is_no_weight_file_is_refused(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"x.npy has an unsupported suffix, not .safetensors, .npz, and with PyTorch"):
        readers.read(tmp_path / "x.npy")
    for name in ("missing.safetensors", "."):
        with pytest.raises(ValueError, match="is not a file"):
            readers.read(tmp_path / name)


class Tensor:
    """What is used of a tensor of PyTorch."""

    def __init__(self, array: np.ndarray, dtype: str = "torch.float32") -> None:
        self.array, self.dtype = array, dtype

    def detach(self) -> "Tensor":
        return self

    def view(self, dtype: Any) -> "Tensor":
        return Tensor(self.array.view(dtype))

    def numpy(self) -> np.ndarray:
        return self.array


def pytorch(monkeypatch: pytest.MonkeyPatch, content: Any) -> list[dict[str, Any]]:
    """A stand-in for PyTorch, which the tests do without; returns what its reader is called with."""
    calls: list[dict[str, Any]] = []

    def load(path: pathlib.Path, **options: Any) -> Any:
        calls.append(options)
        if isinstance(content, Exception):
            raise content
        return content

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load, int16=np.int16))
    return calls


def test_files_of_pytorch_need_pytorch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("x.pt", "x.pth", "x.pth.tar", "x.bin"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            ValueError, match=r"can be read with PyTorch only; save the state as safetensors, or .*: pip install torch"
        ):
            readers.read(tmp_path / name)


def test_files_of_pytorch_are_read_as_plain_weights(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"x")
    plain, half = np.arange(3, dtype=np.float32), np.arange(3).astype(jnp.bfloat16)
    state = {"a": Tensor(plain), "b": Tensor(half, "torch.bfloat16")}
    for content in (state, {"model": state, "epoch": 3}, {"state_dict": state, "optimizer": {}}):
        calls = pytorch(monkeypatch, content)
        arrays = readers.read(path).arrays
        assert calls == [{"weights_only": True, "map_location": "cpu", "mmap": False}]
        assert arrays["a"] is plain
        assert arrays["b"].dtype == jnp.bfloat16
        assert np.array_equal(arrays["b"], half)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    calls = pytorch(monkeypatch, state)
    readers.read(path)
    assert calls[0]["mmap"]


def test_of_weights_and_their_averages_the_ones_asked_for_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm and DeiT write them, and as torchvision does with PyTorch's AveragedModel."""
    path = tmp_path / "x.pth"
    path.write_bytes(b"x")
    raw, averages = {"a.b": Tensor(np.zeros(2))}, {"a.b": Tensor(np.ones(2))}
    averaged_model = {"n_averaged": Tensor(np.ones(())), "module.a.b": Tensor(np.ones(2))}
    for content in (
        {"model": raw, "model_ema": averages},
        {"state_dict": raw, "state_dict_ema": averages},
        {"model": raw, "model_ema": averaged_model},
    ):
        for ema in (False, True):
            pytorch(monkeypatch, content)
            arrays = readers.read(path, ema=ema).arrays
            assert {name: array.tolist() for name, array in arrays.items()} == {"a.b": [float(ema)] * 2}
    pytorch(monkeypatch, {"model": raw})
    assert readers.read(path, ema=True).arrays["a.b"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.UnpicklingError("set weights_only=False if you trust it"), "it holds more than weights; save the"),
        (RuntimeError("damaged\nat many lines"), "is not a valid PyTorch file: damaged; save the state as safetensors"),
        (EOFError(), "is not a valid PyTorch file: EOFError; save"),
        ([1, 2], "has no dict of tensors, also not under model or state_dict"),
        ({"epoch": 3}, "has no dict of tensors"),
        ({}, "has no dict of tensors"),
        ({"model": {"a": Tensor(np.ones(1))}, "state_dict": {}}, "has a state under each of model, state_dict"),
    ],
)
def test_what_pytorch_refuses_is_reported_in_one_line(
    content: Any, why: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"x")
    pytorch(monkeypatch, content)
    with pytest.raises(ValueError, match=why) as error:
        readers.read(path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
