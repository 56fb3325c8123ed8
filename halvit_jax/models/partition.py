"""Axes in the partition rules of all families.

A tied kernel has one rule for both of its uses: split on f, its second dimension. Both mesh axes split that one
dimension, `tensor` outermost, so gathering the parts of `fsdp` gives whole parts of `tensor`. (If they split two, XLA
of jax 0.10 permutes the rows of a product on a mesh of three axes, cf. openxla/xla#40034; tests/training/test_mesh.py.)
"""

SPLIT = ("tensor", "fsdp")
COLUMNS, ROWS = (None, SPLIT), (SPLIT, None)  # a matrix split by its outputs, or by its inputs
FILTERS = (None, None, None, "fsdp")  # a convolution kernel [k, k, c, f], split by its outputs
VECTORS = (r"(bias|scale|mean|var|token|embedding|position|table|across|within)$", ())  # and small tables: never split
