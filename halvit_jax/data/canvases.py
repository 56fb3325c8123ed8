"""Which image goes into which batch of which canvas: arithmetic on steps, the same on any number of hosts.

A canvas is a shape (height, width) of batches; every image belongs to the smallest canvas that holds it. In training
the images of each canvas are permuted by (seed, epoch) and cut into whole global batches, and the batches of all
canvases are shuffled by (seed, epoch).

Shapes: `i` images, `b` rows of the global batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from halvit_jax.text import first_few

Canvas = tuple[int, int]
PERMUTE, SHUFFLE, DRAW = 1, 2, 3  # what a random stream is for


@dataclasses.dataclass(frozen=True)
class Slot:
    """A global batch: its canvas, the position of the image in each row, which rows are images, and their draws."""

    canvas: Canvas
    images: np.ndarray  # int64 [b]
    mask: np.ndarray  # bool [b]: False where a row only fills the batch up
    draws: np.ndarray  # float64 [b, 2] in [0, 1), for the flip and the size

    def rows(self, index: int, count: int) -> "Slot":
        """The rows of one of `count` hosts."""
        own = slice(index * len(self.images) // count, (index + 1) * len(self.images) // count)
        return Slot(self.canvas, self.images[own], self.mask[own], self.draws[own])


def scaled(sizes: np.ndarray, short_side: int, long_side: int) -> np.ndarray:
    """Sizes [i, 2] (height, width) after the resize of mmdetection's `rescale_size`, int32 [i, 2].

    The scale is the larger of those at which the short side is at most `short_side` and the long one at most
    `long_side`; sides are rounded half up. A `short_side` of 0 leaves the sizes.
    """
    if not short_side:
        return sizes.astype(np.int32)
    scale = np.minimum(long_side / sizes.max(1), short_side / sizes.min(1))
    return np.maximum((sizes * scale[:, None] + 0.5).astype(np.int32), 1)


def choose(sizes: np.ndarray, canvases: Sequence[Canvas]) -> np.ndarray:
    """The number of the canvas of each image of these sizes [i, 2]: the smallest that holds it, int64 [i].

    Raises:
        ValueError: no canvas, one of no size, or an image that none holds.
    """
    if not canvases or any(len(canvas) != 2 or min(canvas) < 1 for canvas in canvases):
        raise ValueError(f"instances.canvases={tuple(canvases)} must be one or more (height, width), e.g. (800, 1344)")
    shapes = np.array(canvases)
    fits = (sizes[:, None] <= shapes).all(-1)
    homeless = ~fits.any(1)
    if homeless.any():
        found = [f"{height} x {width}" for height, width in np.unique(sizes[homeless], axis=0)]
        raise ValueError(
            f"instances.canvases={tuple(canvases)} hold no image of {first_few(found)} (height x width, resized), of "
            f"which there are {homeless.sum():,}; add a canvas, or lower instances.short_side or instances.long_side"
        )
    return np.where(fits, shapes.prod(1), np.inf).argmin(1)


class TrainPlan:
    """The batches of training, without end.

    Args:
        canvases: the shapes of batches.
        chosen: the number of each image's canvas, [n].
        images: the position of each image in its index, [n].
        batch_size: rows of a global batch.
        seed: of the order and the draws.
    """

    def __init__(
        self, canvases: Sequence[Canvas], chosen: np.ndarray, images: np.ndarray, *, batch_size: int, seed: int
    ) -> None:
        self._canvases, self._batch_size, self._seed = canvases, batch_size, seed
        self._groups = [images[chosen == number] for number in range(len(canvases))]
        self.never_used = sum(len(group) for group in self._groups if len(group) < batch_size)
        self.steps_per_epoch = sum(len(group) // batch_size for group in self._groups)
        if not self.steps_per_epoch:
            counts = ", ".join(f"{h} x {w}: {len(g)}" for (h, w), g in zip(canvases, self._groups, strict=True))
            raise ValueError(
                f"batch_size={batch_size} is more than the images of any canvas ({counts}); lower it, or give fewer "
                "instances.canvases"
            )

    def slots(self, start_step: int = 0) -> Iterator[Slot]:
        """The batches from a step on."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            for number, (canvas, images) in enumerate(self._epoch(epoch)[first:], first):
                draws = _stream(self._seed, epoch, DRAW, number).random((self._batch_size, 2))
                yield Slot(self._canvases[canvas], images, np.ones(self._batch_size, bool), draws)
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        batches = []
        for canvas, group in enumerate(self._groups):
            order = _stream(self._seed, epoch, PERMUTE, canvas).permutation(group)
            whole = len(group) // self._batch_size
            batches += [(canvas, part) for part in order[: whole * self._batch_size].reshape(whole, self._batch_size)]
        order = _stream(self._seed, epoch, SHUFFLE, 0).permutation(len(batches))
        return [batches[n] for n in order]


class EvalPlan:
    """The batches of one pass: canvas by canvas, each image once; a canvas's last batch is filled up."""

    def __init__(self, canvases: Sequence[Canvas], chosen: np.ndarray, *, batch_size: int) -> None:
        self._canvases, self._batch_size = canvases, batch_size
        self._groups = [np.flatnonzero(chosen == number) for number in range(len(canvases))]
        self.steps_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)

    def slots(self, start_step: int = 0) -> Iterator[Slot]:
        """The batches from number `start_step` on."""
        b, batches = self._batch_size, []
        for canvas, group in zip(self._canvases, self._groups, strict=True):
            batches += [(canvas, group[first : first + b]) for first in range(0, len(group), b)]
        for canvas, images in batches[start_step:]:
            filled = np.concatenate([images, np.zeros(b - len(images), np.int64)])
            yield Slot(canvas, filled, np.arange(b) < len(images), np.ones((b, 2)))


def _stream(*words: int) -> np.random.Generator:
    """A random stream of its own for these numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
