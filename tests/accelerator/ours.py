"""Our models made ready for a trial: task, optimizer, and states made on the host, without compiling."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from halvit_jax.models import create_model
from halvit_jax.protocols import PyTree
from halvit_jax.tasks.classification import Classification
from halvit_jax.training.optim import Optimizer, make_optimizer
from halvit_jax.trees import map_paths

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIMIZER: dict[str, Any] = {
    "name": "adamw",
    "learning_rate": 5e-4,
    "scaling": "linear",
    "base_batch_size": 512,
    "weight_decay": 0.05,
    "no_decay": (r"bias$", r"scale$", r"position/embedding$", r"token$"),
    "frozen": (),
    "layer_decay": 1.0,
    "layers": (r"",),
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "momentum": 0.9,
    "clip_norm": 0.0,
    "clip_adaptive": 0.0,
    "no_clip_adaptive": (),
    "schedule": "cosine",
    "warmup_epochs": 5.0,
    "warmup_start": 1e-6,
    "floor": 1e-5,
    "step_epochs": 30.0,
    "step_factor": 0.1,
}


def make_task(name: str, **fields: Any) -> Classification:
    """The task of classifying with the model `name`."""
    return Classification(create_model(name, **fields), mean=MEAN, std=STD)


def optimizer_of(
    *, batch_size: int, steps_per_epoch: int = 1000, total_steps: int = 300_000, **fields: Any
) -> Optimizer:
    """AdamW as ViTs are trained with it, but for `fields`."""
    lengths = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    return make_optimizer(**(OPTIMIZER | fields), **lengths)


def filled(abstract: PyTree) -> PyTree:
    """Arrays for a state's shapes: noise for what is trained, neutral values for norms and moments."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(2**20 + 1, np.float32)  # repeated: quicker than new ones

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith(("scale", "var")) and "opt_state" not in path:
            value = np.ones(leaf.shape, leaf.dtype)
        elif path.startswith("params/"):
            value = np.resize(noise, leaf.shape).astype(leaf.dtype)
        else:
            value = np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    return map_paths(make, abstract)


def noise(abstract: dict[str, jax.ShapeDtypeStruct], classes: int) -> dict[str, jax.Array]:
    """A batch of noise, on the device."""
    rng = np.random.default_rng(1)
    high = {"image": 256, "label": classes, "mask": 1, "request": 1}
    values = {
        name: rng.integers(0, high.get(name, 1), leaf.shape, np.uint8 if name == "image" else np.int32)
        for name, leaf in abstract.items()
    }
    values["mask"] = np.ones(abstract["mask"].shape, bool)
    return {name: jax.device_put(values[name].astype(leaf.dtype), leaf.sharding) for name, leaf in abstract.items()}


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    from halvit_jax.training.sharding import make_mesh

    return make_mesh(devices=jax.devices()[:1])
