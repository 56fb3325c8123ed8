"""Files of a workdir, to be compared and to be damaged."""

import pathlib

from halvit_jax.training.checkpoint import manifest


def listing(folder: pathlib.Path) -> dict[str, int]:
    """Every file and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def largest_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """A file of a checkpoint, of which arrays are kept in."""
    paths = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max((path for path in paths if path.name != manifest.NAME), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
