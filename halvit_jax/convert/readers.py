"""Read weight files without running code: safetensors, npz, and PyTorch's own if PyTorch is installed.

We parse safetensors ourselves. Measured with version 0.8, the format's own library needs twice the file's size of
memory instead of once, accepts a header that names an array twice, and fails on bfloat16 in NumPy.
"""

import collections
import json
import math
import os
import pathlib
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from halvit_jax import storage
from halvit_jax.convert import hub
from halvit_jax.text import pip_install

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
}
MAX_HEADER = 2**20  # bytes; enough for nine thousand arrays, and small beside any weights
PYTORCH = (".pt", ".pth", ".bin", ".tar")
WRAPPERS = ("model", "state_dict")  # keys of the state in the files of training scripts
EMA_WRAPPERS = ("model_ema", "state_dict_ema")  # keys of its moving average


class Weights(NamedTuple):
    """The content of a weight file."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read(path: str | os.PathLike[str], *, ema: bool = False) -> Weights:
    """All arrays of a weight file, in their stored types; with `ema` the averages where a training script wrote both.

    hf://... is a file on the Hub, see `hub`.

    Memory: the file's size, or half as much again for a compressed npz. Nothing in a file is executed, and wrong sizes
    are refused before memory is allocated for them.

    Raises:
        ValueError: not a file, an unsupported kind, corrupt, or PyTorch is needed and missing.
    """
    path = hub.download(str(path)) if hub.is_source(path) else storage.parse(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if isinstance(path, storage.BucketPath):
        with storage.local_copy(path) as copy:
            return read(copy, ema=ema)
    match path.suffix:
        case ".safetensors":
            return _read_safetensors(path)
        case ".npz":
            return Weights(_read_npz(path), {})
        case suffix if suffix in PYTORCH:
            return Weights(_read_pytorch(path, ema=ema), {})
    kinds = f".safetensors, .npz, and with PyTorch {', '.join(PYTORCH)}"
    raise ValueError(f"{path} has an unsupported suffix, not {kinds}; save the weights as safetensors")


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        ValueError: another suffix, an address of a bucket, or an array that is empty or of an unsupported type.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"{path} must be a local path; copy the file to where it belongs afterwards")
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, the only format that is written")
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide types first, so every array starts at a multiple of its item's size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in codes or not array.size:
            types = ", ".join(dtype.name for dtype in codes)
            raise ValueError(f"{name} of {array.dtype.name} {array.shape} is empty or its type is not one of {types}")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.write(arrays[name].tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Refused(Exception):  # noqa: N818
    """The reason to refuse a file."""


def _read_safetensors(path: pathlib.Path) -> Weights:
    try:
        with open(path, "rb") as file:
            return _parse_safetensors(file)
    except _Refused as why:
        raise ValueError(f"{path} is not a valid safetensors file: {_line(why)}") from None


def _parse_safetensors(file: BinaryIO) -> Weights:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        if head[:2] == b"PK" or head[:1] == b"\x80":
            raise _Refused("it looks like a pickle, which is unsafe to read; save the weights as safetensors")
        raise _Refused("it is truncated" if length <= MAX_HEADER else f"its header would be {length} bytes long")
    header = _parse_json(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("its __metadata__ is not made of strings")
    size -= 8 + length
    spans = {name: _check_entry(name, entry, size) for name, entry in header.items()}
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise _Refused(f"{name} starts at byte {start}, but the arrays before it end at {end}")
        end = stop
    if end != size:
        raise _Refused(f"its arrays end at byte {end} of {size}")
    data = np.empty(size, np.uint8)
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise _Refused("it became shorter while it was read")
    arrays = {
        name: data[start:stop].view(DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
        for name, (start, stop) in spans.items()
    }
    return Weights(arrays, metadata)


def _parse_json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise _Refused(f"its header names {_most_common([name for name, _ in pairs])} twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _Refused("its header is no JSON object")
    return header


def _check_entry(name: str, entry: Any, size: int) -> tuple[int, int]:
    """The offsets of an array among `size` bytes of data, checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"{name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"{name} is of type {reprlib.repr(dtype)}, which is not one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 8 or 0 in shape:
        raise _Refused(f"{name} has the shape {reprlib.repr(shape)}, which is not of at most eight numbers above 0")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise _Refused(f"{name} has the offsets {reprlib.repr(offsets)}, which are not two places among {size} bytes")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise _Refused(f"{name} of {dtype} {reprlib.repr(shape)} does not fill the bytes {offsets}")
    return offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) != len(names):
                raise _Refused(f"it holds {_most_common(names)} twice")
            # A few bytes can unpack to terabytes; weights hardly shrink.
            if sum(entry.file_size for entry in entries) > 1.5 * path.stat().st_size:
                raise _Refused("it unpacks to half as much again or more; save it with numpy.savez, not compressed")
            return {name: _read_npy(archive, entry) for name, entry in zip(names, entries, strict=True)}
    except Exception as why:  # a corrupt archive may raise nearly any error
        raise ValueError(f"{path} is not a valid npz file: {_line(why)}") from None


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise _Refused(f"{entry.filename} is of version {version}")
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject:
            raise _Refused(f"{entry.filename} holds objects, a pickle, which is unsafe to read; save it as safetensors")
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= entry.file_size:
            raise _Refused(f"{entry.filename} of shape {shape} does not fit into its {entry.file_size} bytes")
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:  # in pieces, because the archive's reader holds each twice
            piece = file.read(min(size - done, 2**20))
            if not piece:
                raise _Refused(f"{entry.filename} is truncated")
            data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return data.view(dtype).reshape(shape, order="F" if fortran else "C")


def _read_pytorch(path: pathlib.Path, *, ema: bool) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path} can be read with PyTorch only; save the state as safetensors, or install it: "
            f"{pip_install('torch')}"
        ) from None
    try:
        # Files of the old format are not archives and cannot be memory-mapped.
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
        return {str(name): _to_numpy(tensor, torch.int16) for name, tensor in _state_of(content, ema=ema).items()}
    except Exception as error:  # a corrupt file may raise nearly any error
        # PyTorch's own message for a file with code explains how to run that code.
        why = "it holds more than weights" if type(error).__name__ == "UnpicklingError" else _line(error)
        raise ValueError(f"{path} is not a valid PyTorch file: {why}; save the state as safetensors") from None


def _state_of(content: Any, *, ema: bool = False) -> dict[Any, Any]:
    """The state, at the top or under one of WRAPPERS; with `ema` first under one of EMA_WRAPPERS."""
    if ema and isinstance(content, dict):
        for key in EMA_WRAPPERS:
            if isinstance(content.get(key), dict):
                # PyTorch's AveragedModel counts its updates and holds the model under one more name.
                averages = {name: value for name, value in content[key].items() if name != "n_averaged"}
                return _state_of({name.removeprefix("module."): value for name, value in averages.items()})
    states = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if len(states) > 1:
        raise _Refused(f"it has a state under each of {', '.join(WRAPPERS)}")
    state = states[0] if states else content
    if not isinstance(state, dict) or not state or not all(hasattr(value, "detach") for value in state.values()):
        raise _Refused(f"it has no dict of tensors, also not under {' or '.join(WRAPPERS)}")
    return state


def _to_numpy(tensor: Any, int16: Any) -> np.ndarray:
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # not a type of NumPy
        return tensor.view(int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _most_common(names: list[str]) -> str:
    return collections.Counter(names).most_common(1)[0][0]


def _line(error: BaseException) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:300]
