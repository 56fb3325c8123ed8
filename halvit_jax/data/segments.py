"""The segmentations of a COCO file in two buffers: all polygons, and the bytes of all RLEs.

Shapes: `o` objects, `p` polygons.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from halvit_jax.data import rle

Polygons = list[np.ndarray]  # x, y, x, y, ... each
DECIMALS = 3  # of a coordinate below 8192, that float32 holds
NO_POLYGON = "polygons of fewer than 3 points or of an odd number of coordinates, left out"


@dataclasses.dataclass(frozen=True)
class Segments:
    """Segmentations of objects: the numbers of all polygons in one buffer, the bytes of all RLEs in another."""

    points: np.ndarray  # float32: x, y, x, y, ...
    point_starts: np.ndarray  # int64 [p + 1]
    polygon_starts: np.ndarray  # int64 [o + 1]
    runs: np.ndarray  # uint8
    run_starts: np.ndarray  # int64 [o + 1]

    def polygons(self, number: int) -> Polygons:
        """The polygons of an object, float64; none where it is an RLE.

        Rounded, so that the two decimals of COCO's files come back exactly: what lies on the border between two pixels
        stays there.
        """
        first, end = self.polygon_starts[number : number + 2]
        parts = (self.points[self.point_starts[n] : self.point_starts[n + 1]] for n in range(first, end))
        return [np.round(part.astype(np.float64), DECIMALS) for part in parts]

    def draw(self, number: int, height: int, width: int) -> np.ndarray:
        """The mask of an object on its image, uint8 [h, w]."""
        polygons = self.polygons(number)
        if polygons:
            return rle.draw_polygons(polygons, height, width)
        first, end = self.run_starts[number : number + 2]
        return rle.draw_runs(self.runs[first:end].tobytes(), height, width)


def read(entry: dict[str, Any], height: int, width: int, notes: Counter) -> Polygons | bytes | None:
    """The polygons or the compressed RLE of an annotation on an image of this size; None if it has neither.

    Polygons that are none are left out and counted in `notes`.

    Raises:
        ValueError: a broken RLE, or coordinates that are not finite.
    """
    given = entry.get("segmentation")
    try:
        if isinstance(given, dict):
            return rle.compressed(given, height, width)
        return _polygons(given or [], notes) or None
    except (ValueError, TypeError) as error:
        raise ValueError(f"annotation {entry['id']} has a broken segmentation: {error}") from error


def pack(contents: Iterator[Polygons | bytes | None]) -> tuple[Segments, np.ndarray]:
    """All segmentations that there are in two buffers, and which there are, bool [n]."""
    points: Polygons = []
    runs: list[bytes] = []
    polygon_starts, run_starts, there = [0], [0], []
    for content in contents:
        there.append(content is not None)
        if content is None:
            continue
        if isinstance(content, bytes):
            runs.append(content)
        else:
            points += content
        polygon_starts.append(len(points))
        run_starts.append(run_starts[-1] + (len(content) if isinstance(content, bytes) else 0))
    packed = Segments(
        points=np.concatenate(points) if points else np.zeros(0, np.float32),
        point_starts=np.cumsum([0, *map(len, points)]),
        polygon_starts=np.array(polygon_starts),
        runs=np.frombuffer(b"".join(runs), np.uint8),
        run_starts=np.array(run_starts),
    )
    return packed, np.array(there, bool)


def _polygons(given: Any, notes: Counter) -> Polygons:
    if not isinstance(given, list) or not all(isinstance(part, list) for part in given):
        raise ValueError("neither an RLE nor a list of polygons")
    polygons = [np.array(part, np.float32) for part in given]
    for part in polygons:
        if part.ndim != 1 or not np.isfinite(part).all():
            raise ValueError("a polygon that is not a list of finite numbers")
    whole = [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]
    notes[NO_POLYGON] += len(polygons) - len(whole)
    return whole
