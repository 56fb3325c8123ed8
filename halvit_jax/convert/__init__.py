"""PyTorch states to parameter trees and back: an engine of rules and one table of names per family.

variables = from_torch("deit_tiny", state)        # state: {official PyTorch name: array}
state = to_torch("deit_tiny", variables)          # the same names, values and types
state = to_torch("halvit_tiny", variables, as_deit=True)  # what timm's deit_small_patch16_224 loads

`readers` reads and writes files, `weights_file` stores a model's variables, `transfer` adapts weights to another
classifier or resolution; `python -m halvit_jax.convert` converts from a shell.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np

from halvit_jax.convert import engine, minivit, nextvit, pvt, regnet, resnet, shvit, swin, timm, vit
from halvit_jax.convert.engine import LAYOUTS, Rule
from halvit_jax.models import create_model
from halvit_jax.models.minivit import MiniDeit, MiniSwin
from halvit_jax.models.nextvit import NextViT
from halvit_jax.models.pvt import PVT
from halvit_jax.models.pvt_v2 import PVTv2
from halvit_jax.models.regnet import RegNet
from halvit_jax.models.resnet import ResNet
from halvit_jax.models.shvit import SHViT
from halvit_jax.models.swin import SwinTransformer
from halvit_jax.models.vit import VisionTransformer
from halvit_jax.trees import flatten, unflatten, variable_shapes

__all__ = ["LAYOUTS", "TABLES", "Rule", "from_torch", "rules_of", "shapes_of", "to_torch", "torch_shapes"]

WRAPPER = "module."  # before every name of a state that was saved from inside of PyTorch's DataParallel
TABLES: dict[type, Callable[[Any], tuple[Rule, ...]]] = {
    VisionTransformer: vit.rules,
    ResNet: resnet.rules,
    SwinTransformer: swin.rules,
    MiniDeit: minivit.deit_rules,
    MiniSwin: minivit.swin_rules,
    RegNet: regnet.rules,
    SHViT: shvit.rules,
    PVT: pvt.rules,
    PVTv2: pvt.rules,
    NextViT: nextvit.rules,
}


def from_torch(name: str, state: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The variables of the model `name` from the state of its PyTorch counterpart.

    Args:
        name: a name of `create_model`.
        state: {official PyTorch name: array}, in float32, float16 or bfloat16.
        overrides: fields of the model, as for `create_model`; `num_classes` and `image_size` must be the state's.

    Returns:
        {"params": ..., "batch_stats": ...}, copies in float32; the latter if the model has statistics. BatchNorm's
        `num_batches_tracked` is dropped, because nothing here reads it.

    Raises:
        ValueError: all ambiguous, missing and unexpected entries and shape mismatches by name, or invalid overrides.
    """
    model, state = create_model(name, **overrides), _unwrapped(state)
    if isinstance(model, SwinTransformer):
        swin.check_windows(name, model, state)
    return unflatten(_copied(arrays_from_torch(name, model, state, shapes_of(model))))


def arrays_from_torch(
    name: str, model: Any, state: Mapping[str, Any], wanted: engine.Shapes, *, free: Set[str] = frozenset()
) -> dict[str, np.ndarray]:
    """The arrays of a state, under the official names or timm's, by the paths `wanted`: `engine.from_torch_arrays`.

    Raises:
        ValueError: all ambiguous, missing and unexpected entries and shape mismatches by name.
    """
    names = timm.official_names(model, _unwrapped(state))
    return engine.from_torch_arrays(name, rules_of(name, model), names, wanted, free=free)


def to_torch(
    name: str, variables: Mapping[str, Any], *, as_deit: bool = False, **overrides: Any
) -> dict[str, np.ndarray]:
    """The PyTorch state of the model `name`: {official name: array}; the inverse of `from_torch`.

    Args:
        name: a name of `create_model`.
        variables: the model's variables, from `from_torch`, `model.init` or training.
        as_deit: write a HaLViT as the plain DeiT with the same logits, with every matrix written out.
        overrides: fields of the model, as for `create_model`.

    Returns:
        Copies in float32, and BatchNorm's `num_batches_tracked` as an int64 0.

    Raises:
        ValueError: all missing and unexpected arrays and shape mismatches by path, or a model that is no DeiT.
    """
    model = create_model(name, **overrides)
    rules, arrays = rules_of(name, model), flatten(jax.tree.map(np.asarray, dict(variables)))
    engine.check_tree(name, arrays, shapes_of(model))
    if as_deit:
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"as_deit=True needs a vision transformer, not {name}")
        if isinstance(model, MiniDeit):
            raise ValueError(f"as_deit=True: a DeiT has no mixed heads and relative positions, as {name} does")
        arrays = vit.as_deit(model, arrays)
    return _copied(engine.to_torch(rules, arrays))


def torch_shapes(name: str, **overrides: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the PyTorch state of a model: {official name: shape}. Nothing is computed."""
    model = create_model(name, **overrides)
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes_of(model).items()}
    return {key: array.shape for key, array in engine.to_torch(rules_of(name, model), zeros).items()}


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's variables: {"params/head/bias": (1000,), ...}. Nothing is computed."""
    return {path: leaf.shape for path, leaf in flatten(variable_shapes(model)).items()}


def rules_of(name: str, model: Any) -> tuple[Rule, ...]:
    """The table of a model's PyTorch names; raises ValueError if its family has none."""
    if type(model) not in TABLES:
        raise ValueError(f"{name} has no table of PyTorch names yet")
    return TABLES[type(model)](model)


def _unwrapped(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The names without that of PyTorch's DataParallel, which a state has that was saved with the wrapper."""
    if state and all(name.startswith(WRAPPER) for name in state):
        return {name.removeprefix(WRAPPER): array for name, array in state.items()}
    return state


def _copied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies, so later changes of the input do not change the result."""
    return {
        path: np.array(array, array.dtype if array.dtype == np.int64 else np.float32, order="C")
        for path, array in arrays.items()
    }
