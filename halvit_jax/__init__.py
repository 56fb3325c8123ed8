"""halvit_jax: vision models with half of the weights, and the trainer that makes them, in JAX.

model = halvit_jax.create_model("halvit_tiny", num_classes=10)   # a flax.linen.Module
variables = model.init(jax.random.key(0), images, train=False)   # images [b, h, w, 3], normalised, float32
logits = model.apply(variables, images, train=False)
variables = halvit_jax.from_torch("deit_tiny", state)            # state: {official PyTorch name: numpy array}
state = halvit_jax.to_torch("deit_tiny", variables)
model, variables = halvit_jax.load("runs/halvit_digits")         # the trained model of a run, or of a file
predictor = halvit_jax.load_predictor("runs/halvit_digits")      # with preprocessing and classes: predictor("a.jpg")
model, variables = halvit_jax.halve(deit, variables, images)     # a trained DeiT as a HaLViT, half of its weights
maps = halvit_jax.capture(model, variables, images)["attention"]  # {"block0": [b, heads, tokens, tokens], ...}
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from flax import linen as nn

    from halvit_jax.experiment.predictor import Predictor
    from halvit_jax.models import fold, list_models
    from halvit_jax.models.intermediates import capture

__all__ = [
    "capture",
    "create_model",
    "fold",
    "from_torch",
    "halve",
    "list_models",
    "load",
    "load_predictor",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    """JAX and the models are imported when they are first used, so that wrong flags are reported without a delay."""
    if name in ("fold", "list_models"):
        from halvit_jax import models

        return getattr(models, name)
    if name == "capture":
        from halvit_jax.models.intermediates import capture

        return capture
    raise AttributeError(f"module 'halvit_jax' has no attribute {name!r}")


def load_predictor(
    source: str | os.PathLike[str], *, step: int | str | None = None, image_size: int | None = None
) -> "Predictor":
    """A trained model with its preprocessing and classes, which takes paths, arrays and images of Pillow.

    `source` is the workdir of a run (its newest checkpoint, or that of `step`, which may be "best") or a .safetensors
    file of `halvit_jax.export`. `image_size` is for images of another height and width than those of the training;
    learned positions are resampled.

    Raises:
        ValueError: no run or no checkpoint in a workdir, or a file that does not describe its images.
    """
    from halvit_jax.experiment import predictor

    return predictor.load_predictor(source, step=step, image_size=image_size)


def create_model(name: str, *, pretrained: bool | str = False, **fields: Any) -> Any:
    """The model `name` as a flax.linen.Module; its size is in the family's table, and `fields` change it.

    With `pretrained`, `load` of its published weights on the Hub, or of that source: (model, variables).

    Raises:
        ValueError: no such model, fields that do not fit it, or no published weights.
    """
    from halvit_jax import models

    if pretrained:
        return load(pretrained if isinstance(pretrained, str) else f"hf://{name}", name, **fields)
    return models.create_model(name, **fields)


def from_torch(name: str, state: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The variables of the model `name` from its PyTorch state: {official name: array}. See `halvit_jax.convert`.

    Raises:
        ValueError: every ambiguous, missing or unexpected entry and every shape mismatch, by name.
    """
    from halvit_jax import convert  # slow: builds its tables of names

    return convert.from_torch(name, state, **overrides)


def to_torch(
    name: str, variables: Mapping[str, Any], *, as_deit: bool = False, **overrides: Any
) -> "dict[str, np.ndarray]":
    """The PyTorch state of the model `name`; with `as_deit`, a HaLViT as the plain DeiT that gives the same logits.

    Raises:
        ValueError: every missing or unexpected array and every shape mismatch, by path.
    """
    from halvit_jax import convert

    return convert.to_torch(name, variables, as_deit=as_deit, **overrides)


def halve(
    model: "nn.Module", variables: Mapping[str, Any], images: "np.ndarray", **options: Any
) -> "tuple[nn.Module, dict[str, Any]]":
    """A trained DeiT as a HaLViT of the same shape, tied to what it computes on some normalised images [b, h, w, 3].

    Without labels. See `halvit_jax.halving.halve.halve` for the options, such as `fit_steps=1500` and `ffn="dense"`.

    Raises:
        ValueError: a model that cannot be halved, images of another size, or too few.
    """
    from halvit_jax.halving import halve as halving  # slow: imports optax and SciPy

    return halving.halve(model, variables, images, **options)


def load(
    source: str | os.PathLike[str], name: str | None = None, *, step: int | str | None = None, **overrides: Any
) -> "tuple[nn.Module, dict[str, Any]]":
    """A model and its variables.

    `source` is the workdir of a run (its newest checkpoint, or that of `step`, which may be "best"; the EMA if there is
    one); a .safetensors file of `halvit_jax.convert`, `halvit_jax.export` or `halvit_jax.halve`; a PyTorch state in a
    .safetensors, .npz or .pth file, of the model `name` with `overrides`; or such a file on the Hugging Face Hub,
    hf://OWNER/REPOSITORY (see
    `convert.hub`).

    The model computes in float32 on images normalised with the mean and deviation of its recipe.

    Raises:
        ValueError: no run or no checkpoint in a workdir, or an unreadable file.
    """
    from halvit_jax import storage
    from halvit_jax.convert import hub, readers, weights_file

    if not hub.is_source(source) and storage.parse(source).is_dir():
        if name is not None or overrides:
            raise ValueError(f"{source} is the workdir of a run, whose config names the model; give no other argument")
        from halvit_jax.experiment.trained import load_trained  # slow: imports the trainer

        trained = load_trained(os.fspath(source), step=step)
        return trained.task.model, trained.model_variables
    if step is not None:
        raise ValueError(f"step={step!r} chooses a checkpoint of a workdir, and {source} is none")
    weights = readers.read(source)
    if weights_file.DETECTOR in weights.metadata and name is None and not overrides:
        from halvit_jax.experiment.trained import load_trained

        trained = load_trained(os.fspath(source))
        return trained.task.model, trained.model_variables
    found = weights_file.load_any(os.fspath(source), weights, name, overrides)
    return create_model(found.name, **found.fields), found.variables
