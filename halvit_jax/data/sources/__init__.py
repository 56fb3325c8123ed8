"""Sources of examples: one file and one row in `SOURCES` for each kind."""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from halvit_jax import storage
from halvit_jax.data import ops
from halvit_jax.data.evals import EvalSet, parse_evals
from halvit_jax.data.sources.base import Source
from halvit_jax.data.sources.image_folder import open_folder
from halvit_jax.data.sources.tfds import open_tfds
from halvit_jax.text import first_few

SOURCES: Mapping[str, Callable[[str, str, str, str], Source]] = {"folder": open_folder}
"""data.name -> (name, data_dir, split, root) -> source. Every other name is a data set of TFDS."""


def open_source(name: str, data_dir: str, split: str, *, root: str = "") -> Source:
    """The split of the prepared TFDS data set `name` under `data_dir` ("": TFDS's own default).

    The name "folder" stands for the images in root/split/<class>/. The embedded sets are prepared where they are
    missing; nothing is ever downloaded.

    Raises:
        ValueError: no such data set or split, not or only partly prepared, without the features needed, or in
            another store than a disk or a bucket of Google Cloud Storage.
    """
    storage.check_scheme(data_dir, "data.data_dir=")
    storage.check_scheme(root, "data.root=")
    try:
        return SOURCES.get(name, open_tfds)(name, data_dir, split, root)
    except tf.errors.OpError as error:  # a bucket without access
        field = f"data.root={root}" if root else f"data.data_dir={data_dir}"
        raise ValueError(f"{field} cannot be read ({ops.reason(error)}); name another one") from error


def open_sources(
    name: str,
    data_dir: str,
    root: str,
    train_split: str | None,
    eval_name: str,
    eval_split: str,
    evals: Sequence[str] = (),
) -> tuple[Source | None, dict[str, Source]]:
    """The training source, and the evaluation sources by the name of their curves; `open_source` explains the words.

    A `train_split` of None is for evaluation alone.

    The first is "eval"; the entry "v2=imagenet_v2:test" of `evals` is "eval_v2". An entry without a data set, such as
    "half=:test[:50%]", is a split of `name`.

    Raises:
        ValueError: also where a source has other classes than the first one, because labels would then mean different
            things, or where the training source has several labels an image.
    """
    train = None if train_split is None else open_source(name, data_dir, train_split, root=root)
    if train and train.info.extra.get("several_labels"):
        raise ValueError(
            f"data.name={name!r} has several labels an image and is for evaluation only; set data.eval_name or "
            "data.evals to it"
        )
    sets = {"eval": (f"data.eval_split={eval_split!r}", EvalSet(eval_name, eval_split))}
    sets |= {f"eval_{key}": (f"data.evals {key}=", given) for key, given in parse_evals(evals).items()}
    sources: dict[str, Source] = {}
    first, what = train, f"data.train_split={train_split!r} of {root or name}"
    for key, (field, (eval_set, split)) in sets.items():
        try:
            source = open_source(eval_set or name, data_dir, split, root=root)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
        if first is None:
            first, what = source, f"{field} of {root or eval_set or name}"
        classes, found = first.info.class_names, source.info.class_names
        if classes != found:
            differing = first_few(sorted(set(classes) ^ set(found)))
            raise ValueError(
                f"{what} and {field} of {root or eval_set or name} must have the same classes; "
                f"{f'only one of them has {differing}' if differing else 'their order differs'}"
            )
        sources[key] = source
    return train, sources
