"""Where examples come from: one file a kind of source."""

from halvit_jax.data.sources.base import Source
from halvit_jax.data.sources.image_folder import Folder
from halvit_jax.data.sources.tfds import open_tfds
from halvit_jax.text import first_few


def open_sources(
    name: str, data_dir: str, root: str, train_split: str, eval_name: str, eval_split: str
) -> tuple[Source, Source]:
    """The sources to train on and to evaluate on; `open_source` says what the words mean.

    Raises:
        ValueError: also where the two have other classes, whose numbers would then mean different things.
    """
    train = open_source(name, data_dir, train_split, root=root)
    evaluation = open_source(eval_name, data_dir, eval_split, root=root)
    differing = sorted(set(train.class_names) ^ set(evaluation.class_names))
    if differing:
        raise ValueError(
            f"data.train_split={train_split!r} of {root or name} and data.eval_split={eval_split!r} of "
            f"{root or eval_name} must have the same classes; only one of them has {first_few(differing)}"
        )
    return train, evaluation


def open_source(name: str, data_dir: str, split: str, *, root: str = "") -> Source:
    """The split of the prepared TFDS data set `name` under `data_dir` ("": TFDS's own default).

    The name "folder" stands for the images in root/split/<class>/. The embedded sets are prepared where they are
    missing; nothing is ever downloaded.

    Raises:
        ValueError: no such data set or split, not or only partly prepared, or without `image` and `label`.
    """
    if name == "folder":
        return Folder(root, split)
    if root:
        raise ValueError(f"data.root={root!r} is for data.name='folder', and data.name={name!r}; set one or the other")
    return open_tfds(name, data_dir, split)
