"""Data: from sources to batches. The one package that imports TensorFlow."""

import os

# TensorFlow's C++ code prints lines when it is imported, in Python too, where no command has set these.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from halvit_jax.data.errors import undecodable
from halvit_jax.data.instance_loaders import make_detection_loaders
from halvit_jax.data.instances import put_on_canvas, read_on_canvas
from halvit_jax.data.pipeline import Host, make_loaders
from halvit_jax.data.sources import open_source
from halvit_jax.data.sources.image_folder import image_files
from halvit_jax.data.transforms import eval_transform, png, read_image, transform_array, write_png

__all__ = [
    "Host",
    "eval_transform",
    "hide_accelerators",
    "image_files",
    "make_detection_loaders",
    "make_loaders",
    "open_source",
    "png",
    "put_on_canvas",
    "read_image",
    "read_on_canvas",
    "transform_array",
    "undecodable",
    "write_png",
]


def hide_accelerators() -> None:
    """Keep TensorFlow off the accelerators, or it would take their memory. Call before the first batch."""
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
