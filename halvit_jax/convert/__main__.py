"""Convert weights between PyTorch's names and ours.

python -m halvit_jax.convert IN OUT --model=NAME [--to=jax|torch|deit] [--num_classes=N] [--image_size=N]

IN is a state under the official PyTorch names (.safetensors, .npz, or .pth with PyTorch installed) or a file that this
command wrote, which names its model. OUT is a .safetensors file: with --to=jax under our paths, with --to=torch
under the official names, with --to=deit a HaLViT written out as the plain DeiT that gives the same logits.

The output has a line for each: arrays, numbers in them, and a digest of names, shapes, types and values, which is the
same for the same arrays whatever kind of file they are in.
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
    flags.DEFINE_string("model", None, "The model's name; may be left out where IN knows it.")
    flags.DEFINE_enum("to", "jax", TARGETS, "What to write.")
    flags.DEFINE_integer("num_classes", None, "Size of the classifier; 0: there is none.")
    flags.DEFINE_integer("image_size", None, "Height and width of the images the weights are for.")


def convert(source: str, target: str, *, name: str | None, to: str, fields: dict[str, Any]) -> list[str]:
    """Read `source`, write `target`, and return the lines to print.

    Raises:
        ValueError: no model is named, another one is in the file, or what reading, converting and writing refuse.
    """
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
    """Convert one file and print what was read and written."""
    with app.report_user_errors():
        if len(argv) != 3:
            raise ValueError("give a file to read and one to write: python -m halvit_jax.convert IN OUT --model=NAME")
        given = flags.FLAGS
        fields = {"num_classes": given.num_classes, "image_size": given.image_size}
        for line in convert(argv[1], argv[2], name=given.model, to=given.to, fields=fields):
            print(line)


def _receipt(path: str, arrays: dict[str, Any]) -> str:
    return f"{os.fspath(path)}: {len(arrays)} arrays, {count(arrays):,} numbers, sha256 {sha256(arrays)}"


if __name__ == "__main__":
    define_flags()
    app.run(main)
