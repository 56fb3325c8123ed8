"""Data: where batches come from. TensorFlow lives here and only here."""

from halvit_jax.data.pipeline import Host, eval_transform, make_loaders, read_image
from halvit_jax.data.sources import open_source

__all__ = ["Host", "eval_transform", "hide_accelerators", "make_loaders", "open_source", "read_image"]


def hide_accelerators() -> None:
    """Keep TensorFlow off every accelerator, whose memory it would otherwise take. Call before the first batch."""
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
