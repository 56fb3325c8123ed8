"""Convert weights between PyTorch's names and ours.

python -m halvit_jax.convert IN OUT --model=NAME [--to=jax|torch|deit] [--num_classes=N] [--image_size=N]

IN is a state under the official PyTorch names (.safetensors, .npz, or .pth with PyTorch installed) or a file of this
command, which names its model. OUT is a .safetensors file: with --to=jax under our paths, with --to=torch under the
official names, with --to=deit a HaLViT written out as the plain DeiT with the same logits.

The output has a line for each file: arrays, numbers in them, and a digest of names, shapes, types and values that does
not depend on the kind of file.
"""

import os
from typing import Any

from absl import flags

from halvit_jax.cli import app
from halvit_jax.convert import readers, to_torch, weights_file
from halvit_jax.trees import count, flatten, sha256

TARGETS = ("jax", "torch", "deit")


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_string("model", None, "The model's name; not needed if IN names it.")
    flags.DEFINE_enum("to", "jax", TARGETS, "Names and layouts to write.")
    flags.DEFINE_integer("num_classes", None, "Size of the classifier; 0: none.")
    flags.DEFINE_integer("image_size", None, "Height and width of the model's images.")


def convert(source: str, target: str, *, name: str | None, to: str, fields: dict[str, Any]) -> list[str]:
    """Read `source`, write `target`, and return the lines to print; raises ValueError for bad files and names."""
    weights = readers.read(source)
    name, fields, variables = weights_file.load_any(source, weights, name, fields)
    if to == "jax":
        weights_file.save(target, name, variables, **fields)
        written = flatten(variables)
    else:
        written = to_torch(name, variables, as_deit=to == "deit", **fields)
        readers.write(target, written, {"format": "pt", "model": name})
    rows = [_receipt(source, weights.arrays), _receipt(target, written)]
    return [f"{name}: {count(variables['params']):,} parameters", *rows]


def main(argv: list[str]) -> None:
    """Convert one file and print a summary of input and output."""
    with app.report_user_errors():
        if len(argv) != 3:
            raise ValueError("give an input and an output file: python -m halvit_jax.convert IN OUT --model=NAME")
        given = flags.FLAGS
        if os.path.exists(argv[2]):
            raise ValueError(f"{argv[2]} exists; name another file, or remove it")
        fields = {"num_classes": given.num_classes, "image_size": given.image_size}
        for line in convert(argv[1], argv[2], name=given.model, to=given.to, fields=fields):
            print(line)


def _receipt(path: str, arrays: dict[str, Any]) -> str:
    return f"{os.fspath(path)}: {len(arrays)} arrays, {count(arrays):,} numbers, sha256 {sha256(arrays)}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
