"""Your own images: root/train/<class>/<image> and root/val/<class>/<image> as a source."""

import collections
import os

import tensorflow as tf

from halvit_jax.data.ops import no_autograph
from halvit_jax.data.sources.base import Entry, Record, Source, position_shard
from halvit_jax.protocols import DatasetInfo
from halvit_jax.text import first_few

NAME = "folder"
PERMUTATION_SEED = (0, 0)  # the same for every run, so that a shard has the same images in all epochs
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # what TensorFlow decodes; of a GIF the first frame


class ImageFolder(Source):
    """The images in root/split/<class>/, sorted by path; the label is the index of the class among the sorted names.

    Hidden files, files with other suffixes and deeper folders are ignored. An entry is the position of an image, so
    shuffling, repeating and skipping reads no file. For training the positions are first permuted, by a fixed seed: the
    images are sorted by class, and a shard of few classes would fill its rows of every batch with only those.

    Raises:
        ValueError: a folder that is missing or holds no classes, or a class without images.
    """

    def __init__(self, root: str, split: str) -> None:
        folder = os.path.join(root, split)
        if not root:
            raise ValueError("data.name='folder' needs data.root, the folder that holds the images")
        if not tf.io.gfile.isdir(root):
            raise ValueError(f"data.root={root!r} is not a folder")
        if not tf.io.gfile.isdir(folder):
            raise ValueError(
                f"data.root={root!r} has no folder {split!r}; data.train_split, data.eval_split and data.evals name "
                f"its sub-folders, and it has {', '.join(_subfolders(root)) or 'none'}"
            )
        classes = _subfolders(folder)
        if not classes:
            raise ValueError(f"{folder} of data.root has no sub-folders; each class needs one, named after it")
        images = {name: _images(os.path.join(folder, name)) for name in classes}
        empty = [name for name in classes if not images[name]]
        if empty:
            found = first_few([_describe(os.path.join(folder, name)) for name in empty])
            raise ValueError(f"{folder} of data.root has classes without images ({', '.join(SUFFIXES)}): {found}")
        paths = [path for name in classes for path in images[name]]
        labels = [label for label, name in enumerate(classes) for _ in images[name]]
        self.info = DatasetInfo(classes, len(paths), NAME)
        self._paths, self._labels = tf.constant(paths), tf.constant(labels, tf.int32)
        positions = tf.range(len(paths), dtype=tf.int64)
        self._permuted = tf.random.experimental.stateless_shuffle(positions, PERMUTATION_SEED, alg="philox")

    def shard(self, index: tf.Tensor | int, count: int, seed: tf.Tensor | None = None) -> tf.data.Dataset:
        """The positions of a shard; with a seed those of a shard of the permuted split, shuffled uniformly."""
        shard = position_shard(self.info.num_examples, index, count, seed)
        if seed is None:
            return shard
        return shard.map(no_autograph(lambda entry: {"position": tf.gather(self._permuted, entry["position"])}))

    def fetch(self, entry: Entry) -> Record:
        """The file at the entry's position, undecoded, and its label."""
        path = tf.gather(self._paths, entry["position"])
        return {"image": tf.io.read_file(path), "label": tf.gather(self._labels, entry["position"]), "name": path}


def open_folder(name: str, data_dir: str, split: str, root: str) -> ImageFolder:
    """The images in root/split/<class>/."""
    del name, data_dir
    return ImageFolder(root, split)


def _subfolders(folder: str) -> list[str]:
    names = sorted(name.rstrip("/") for name in tf.io.gfile.listdir(folder))  # a bucket's folders end in a slash
    return [name for name in names if not name.startswith(".") and tf.io.gfile.isdir(os.path.join(folder, name))]


def _images(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _files(folder) if name.lower().endswith(SUFFIXES)]


def _files(folder: str) -> list[str]:
    return sorted(name for name in tf.io.gfile.listdir(folder) if not name.startswith("."))


def _describe(folder: str) -> str:
    """A class folder without images, and what it holds instead."""
    kinds = collections.Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in _files(folder))
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{os.path.basename(folder)} ({found or 'empty'})"
