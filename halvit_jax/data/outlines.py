"""Masks as COCO's segmentations: outlines along the edges of pixels, and uncompressed RLE.

Shapes: `h w` image.
"""

from typing import Any

import numpy as np

Point = tuple[int, int]  # x, y of a pixel's corner
RIGHT_TURN = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}


def segmentation(mask: np.ndarray) -> list[list[int]] | dict[str, Any]:
    """A mask, bool [h, w], as polygons; as an uncompressed RLE where it has a hole, which no polygon can have."""
    polygons = outlines(mask)
    return uncompressed(mask) if polygons is None else polygons


def outlines(mask: np.ndarray) -> list[list[int]] | None:
    """The outline of each 4-connected part of a mask, bool [h, w], as x, y, x, y, ...; None if there is a hole."""
    edges = _edges(mask)
    found = []
    while edges:
        start = next(iter(edges))
        corners = _walk(edges, start)
        ends = np.roll(corners, -1, 0)
        if (corners[:, 0] * ends[:, 1] - corners[:, 1] * ends[:, 0]).sum() < 0:
            return None  # around a hole the edges run the other way
        found.append(corners.ravel().tolist())
    return found


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """The uncompressed RLE of a mask, bool [h, w]: runs down the columns, the first one of background."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def _edges(mask: np.ndarray) -> dict[tuple[Point, Point], None]:
    """The edges between a mask and the rest, as (corner, direction) with the mask on the right of the direction."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    # Direction -> (the neighbour across the edge, shift of the edge's first corner against the pixel's upper left one).
    sides = {
        (1, 0): (padded[:-2, 1:-1], (0, 0)),
        (0, 1): (padded[1:-1, 2:], (1, 0)),
        (-1, 0): (padded[2:, 1:-1], (1, 1)),
        (0, -1): (padded[1:-1, :-2], (0, 1)),
    }
    edges: dict[tuple[Point, Point], None] = {}
    for direction, (neighbour, (dx, dy)) in sides.items():
        rows, columns = np.nonzero(inside & ~neighbour)
        edges |= {((x + dx, y + dy), direction): None for x, y in zip(columns.tolist(), rows.tolist(), strict=True)}
    return edges


def _walk(edges: dict[tuple[Point, Point], None], start: tuple[Point, Point]) -> np.ndarray:
    """The corners of the closed way from an edge on, [corners, 2]; its edges are taken out.

    Where two parts touch at a corner, the turn to the right stays with the same one.
    """
    corners: list[Point] = []
    (x, y), direction = start
    while True:
        edges.pop(((x, y), direction))
        x, y = x + direction[0], y + direction[1]
        right = RIGHT_TURN[direction]
        turns = [((x, y), turn) for turn in (right, direction, (-right[0], -right[1]))]
        ahead = next(edge for edge in turns if edge in edges or edge == start)
        if ahead[1] != direction:
            corners.append((x, y))
        if ahead == start:
            return np.array(corners)
        direction = ahead[1]
