"""Own images: root/train/<class>/<image> and root/val/<class>/<image> as a source."""

import collections
import os

import tensorflow as tf

from halvit_jax.data.sources.base import Entry, Reader, Record, positions
from halvit_jax.text import first_few

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")  # what TensorFlow decodes; of a GIF the first frame


class Folder:
    """The images in root/split/<class>/, in the order of their names; the label is the place of the class by name.

    Hidden files, files with other suffixes and what lies deeper are passed over. An entry is the position of an image,
    so ordering, repeating and skipping reads no file.

    Raises:
        ValueError: a folder that is missing or holds no classes, or a class without images.
    """

    def __init__(self, root: str, split: str) -> None:
        folder = os.path.join(root, split)
        if not root:
            raise ValueError("data.name='folder' needs data.root, the folder that holds the images")
        if not tf.io.gfile.isdir(root):
            raise ValueError(f"data.root={root!r} is no folder")
        if not tf.io.gfile.isdir(folder):
            raise ValueError(
                f"data.root={root!r} has no folder {split!r}; data.train_split and data.eval_split name its "
                f"sub-folders, and it has {', '.join(_subfolders(root)) or 'none'}"
            )
        self.class_names = _subfolders(folder)
        if not self.class_names:
            raise ValueError(f"{folder} of data.root has no sub-folders; each class needs one, named after it")
        images = {name: _images(os.path.join(folder, name)) for name in self.class_names}
        empty = [name for name in self.class_names if not images[name]]
        if empty:
            found = first_few([_describe(os.path.join(folder, name)) for name in empty])
            raise ValueError(f"{folder} of data.root has classes without images ({', '.join(SUFFIXES)}): {found}")
        paths = [path for name in self.class_names for path in images[name]]
        labels = [label for label, name in enumerate(self.class_names) for _ in images[name]]
        self.num_examples = len(paths)
        self._paths, self._labels = tf.constant(paths), tf.constant(labels, tf.int32)

    def reader(self, parts: int) -> Reader:
        """A function of a number below `parts`, and a seed, that gives this part's positions in any possible order."""
        return positions(self.num_examples, parts)

    def fetch(self, entry: Entry) -> Record:
        """The file at the entry's position, undecoded."""
        path = tf.gather(self._paths, entry["position"])
        return {"image": tf.io.read_file(path), "label": tf.gather(self._labels, entry["position"]), "name": path}


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
