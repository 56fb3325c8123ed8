"""Your own images as a source: class folders, with or without a folder for each split, or a CSV of labels."""

import collections
import contextlib
import csv
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from halvit_jax import storage
from halvit_jax.data.file_formats import PILLOW_SUFFIXES, SUFFIXES, has_pillow
from halvit_jax.data.ops import no_autograph
from halvit_jax.data.sources.base import Entry, Record, Source, position_shard
from halvit_jax.protocols import DatasetInfo
from halvit_jax.text import first_few, pip_install

LOG = logging.getLogger("halvit_jax.data")
NAME = "folder"
PERMUTATION_SEED = (0, 0)  # the same for every run, so that a shard has the same images in all epochs
SPLITS = ("train", "val", "valid", "validation", "test")  # usual names of the folders of splits
HELD_OUT = 0.2  # part of each class that is held out for evaluation where there are no splits
COLUMNS = {"image": ("image", "file", "filename", "path"), "label": ("label", "class"), "split": ("split",)}  # of a CSV
SLICED = re.compile(r"([^\[\]]*)\[(?:(\d+)%)?:(?:(\d+)%)?\]")  # "train[:80%]"


class Labelled(NamedTuple):
    """Images and their classes: `items` are (path, name of the class), sorted; `classes` in the order of the labels."""

    items: list[tuple[str, str]]
    classes: list[str]


class ImageFolder(Source):
    """The images of a split, sorted by path; the label is the index of the class among the sorted names.

    `root` is one of three. A folder with root/split/<class>/; a folder with root/<class>/, of which a fifth of each
    class is held out: that is every split but "train"; or a CSV file with the columns image (relative to the file),
    label and, if the splits are not to be made in the same way, split. A slice such as "train[:80%]" takes that part of
    each class, in a fixed random order. Deeper folders belong to their class. Hidden files are ignored, and other files
    that are no images are counted in a warning.

    An entry is the position of an image, so shuffling, repeating and skipping reads no file. For training the positions
    are first permuted, by a fixed seed: the images are sorted by class, and a shard of some classes alone would give a
    row of a batch those classes for ever.

    Raises:
        ValueError: a folder or file that is missing, holds no classes, or has a class without images.
    """

    def __init__(self, root: str, split: str) -> None:
        if not root:
            raise ValueError("data.name='folder' needs data.root, the folder that holds the images")
        root = os.path.expanduser(root)
        name, start, stop = _parse_split(split)
        read = _read_csv if root.lower().endswith(".csv") else _read_folders
        found = read(root, name)
        items = [item for part in _by_class(found).values() for item in sorted(_slice(part, start, stop))]
        if not items:
            raise ValueError(f"data.root={root!r} has no image in the split {split!r}")
        numbers = {label: number for number, label in enumerate(found.classes)}
        labels = [numbers[label] for _, label in items]
        self.info = DatasetInfo(found.classes, len(items), NAME)
        self._paths = tf.constant([path for path, _ in items])
        self._labels = tf.constant(labels, tf.int32)
        positions = tf.range(len(items), dtype=tf.int64)
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
    """The images of `root`."""
    del name, data_dir
    return ImageFolder(root, split)


def image_files(folder: str) -> list[str]:
    """The paths of all images in a folder and below it, by their suffixes, sorted."""
    return [path for path in _files(folder) if path.lower().endswith(_suffixes())]


def _suffixes() -> tuple[str, ...]:
    return SUFFIXES + PILLOW_SUFFIXES if has_pillow() else SUFFIXES


def _read_folders(root: str, split: str) -> Labelled:
    """The images of root/split/<class>/; where no folder of a split is there, of a part of root/<class>/."""
    if storage.is_bucket(root):
        with contextlib.suppress(tf.errors.NotFoundError):
            tf.io.gfile.stat(root)  # raises if there is no access, of which `isdir` makes a "no"
    if not tf.io.gfile.isdir(root):
        raise ValueError(f"data.root={root!r} is not a folder")
    folder, inside = os.path.join(root, split), _subfolders(root)
    automatic = split in SPLITS and inside and not set(inside) & set(SPLITS)
    if not automatic and not tf.io.gfile.isdir(folder):
        raise ValueError(
            f"data.root={root!r} has no folder {split!r}; data.train_split, data.eval_split and data.evals name "
            f"its sub-folders, and it has {', '.join(inside) or 'none'}"
        )
    folder = root if automatic else folder
    classes = _subfolders(folder)
    if not classes:
        raise ValueError(f"{folder} of data.root has no sub-folders; each class needs one, named after it")
    files = {name: _files(os.path.join(folder, name)) for name in classes}
    suffixes = _suffixes()
    images = {name: [path for path in files[name] if path.lower().endswith(suffixes)] for name in classes}
    empty = [name for name in classes if not images[name]]
    if empty:
        found = first_few([f"{name} ({_kinds(files[name]) or 'empty'})" for name in empty])
        raise ValueError(f"{folder} of data.root has classes without images ({', '.join(suffixes)}): {found}")
    passed_over = [path for name in classes for path in files[name] if not path.lower().endswith(suffixes)]
    if passed_over:
        wanting = any(path.lower().endswith(PILLOW_SUFFIXES) for path in passed_over)
        hint = f"; WebP and TIFF need Pillow: {pip_install('pillow')}" if wanting else ""
        LOG.warning("%s: %d files passed over, %s%s", folder, len(passed_over), _kinds(passed_over), hint)
    labelled = Labelled([(path, name) for name in classes for path in images[name]], classes)
    return _held_out(labelled, split) if automatic else labelled


def _read_csv(file: str, split: str) -> Labelled:
    """The images that a CSV file names, all of a split; without a column for it, of a part."""
    try:
        with tf.io.gfile.GFile(file) as opened:
            rows = list(csv.DictReader(opened, skipinitialspace=True))
    except tf.errors.OpError as error:
        raise ValueError(f"data.root={file!r} cannot be read: {error.message.splitlines()[0]}") from error
    header = [name for name in (rows[0] if rows else {}) if name]
    names = {kind: next((name for name in header if name.lower() in known), "") for kind, known in COLUMNS.items()}
    if not rows or not names["image"] or not names["label"]:
        raise ValueError(
            f"data.root={file!r} needs a first line with the columns image and label (and, if you like, split), and "
            f"images below it; it has {', '.join(header) or 'nothing'}"
        )
    lacking = [str(line) for line, row in enumerate(rows, 2) if not row[names["image"]] or not row[names["label"]]]
    if lacking:
        raise ValueError(f"data.root={file!r} lacks an image or a label in line {first_few(lacking)}")
    classes = sorted({row[names["label"]] for row in rows})
    if names["split"]:
        known = {row[names["split"]] for row in rows}
        if split not in known:
            raise ValueError(f"data.root={file!r} has no split {split!r}; its column has {', '.join(sorted(known))}")
        rows = [row for row in rows if row[names["split"]] == split]
    items = [(os.path.join(os.path.dirname(file), row[names["image"]]), row[names["label"]]) for row in rows]
    missing = [path for path, _ in items if not tf.io.gfile.exists(path)]
    if missing:
        raise ValueError(f"data.root={file!r} names {len(missing)} files that are not there: {first_few(missing)}")
    labelled = Labelled(sorted(items), classes)
    return labelled if names["split"] else _held_out(labelled, split)


def _held_out(labelled: Labelled, split: str) -> Labelled:
    """All but a fifth of each class for "train", that fifth for another split."""
    bounds = (HELD_OUT, 1.0) if split == "train" else (0.0, HELD_OUT)
    kept = [item for part in _by_class(labelled).values() for item in _slice(part, *bounds)]
    return labelled._replace(items=kept)


def _by_class(labelled: Labelled) -> dict[str, list[tuple[str, str]]]:
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in labelled.classes}
    for item in labelled.items:
        parts[item[1]].append(item)
    return parts


def _slice(items: Sequence[tuple[str, str]], start: float, stop: float) -> list[tuple[str, str]]:
    """The part of a class between two fractions. Its order is that of the digests of the names, the same everywhere."""
    if (start, stop) == (0.0, 1.0):
        return list(items)
    ordered = sorted(items, key=lambda item: hashlib.sha256(os.path.basename(item[0]).encode()).digest())
    return ordered[round(start * len(items)) : round(stop * len(items))]


def _parse_split(split: str) -> tuple[str, float, float]:
    """("train", 0.0, 0.8) of "train[:80%]"."""
    found = SLICED.fullmatch(split)
    if found is None:
        if "[" in split:
            raise ValueError(f"the split {split!r} of data.name='folder' must be a name, or like train[:80%]")
        return split, 0.0, 1.0
    return found[1], int(found[2] or 0) / 100, int(found[3] or 100) / 100


def _subfolders(folder: str) -> list[str]:
    names = sorted(name.rstrip("/") for name in tf.io.gfile.listdir(folder))  # a bucket's folders end in a slash
    return [name for name in names if not name.startswith(".") and tf.io.gfile.isdir(os.path.join(folder, name))]


def _files(folder: str) -> list[str]:
    """All files below a folder, sorted, without hidden ones."""
    found = []
    walk = tf.io.gfile.walk if "://" in folder else os.walk  # which asks nothing of each file
    for parent, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _kinds(paths: Sequence[str]) -> str:
    """Files counted by their suffix: "3 .txt, 1 no suffix"."""
    kinds = collections.Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in paths)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
