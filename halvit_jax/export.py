"""Take a trained model out of its run, to be used elsewhere.

python -m halvit_jax.export --workdir=DIR --format=stablehlo|safetensors|onnx --out=FILE

What is written, but for safetensors, maps uint8 images [b, s, s, 3] for any b to float32 logits [b, classes];
normalisation is inside. Resizing is not: the description says how (`crop` is the share of the resized image that is cut
out of its middle). The description, with the names of the classes, is inside too:

- stablehlo: a zip of model.bin (for `jax.export.deserialize`) and info.json; runs on CPU, GPU and TPU
- onnx: for onnxruntime and others; needs `pip install 'halvit_jax[onnx]'`; the description is in the model's metadata
- safetensors: the parameters, each once, for `halvit_jax.load` and `--config.init_from`; the description is in its head

The receipt compares what was written, read again from disk, with the model in JAX on the images that the run is
evaluated on.

There is no SavedModel: TensorFlow 2.21 reads StableHLO up to version 1.13, and jax 0.10 writes 1.15.
"""

import json
import logging
import os
import pathlib
import statistics
import time
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from halvit_jax.cli import app
from halvit_jax.experiment.build import build_loaders
from halvit_jax.experiment.trained import Trained, load_trained
from halvit_jax.models import family_of, fold

Run = Callable[[np.ndarray], np.ndarray]  # uint8 images [b, s, s, 3] -> logits [b, classes]
PLATFORMS = ("cpu", "cuda", "tpu")
CALLS = 20  # that the latency is the median of


class Served(NamedTuple):
    """The function to export, which closes over the variables, and its description."""

    call: Callable[[jax.Array], jax.Array]
    image_size: int
    info: dict[str, Any]


def define_flags() -> None:
    """The flags of this door."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")
    flags.DEFINE_enum("format", None, list(FORMATS), "What to write.")
    flags.DEFINE_string("out", None, "The file to write.")


def main(argv: list[str]) -> None:
    """Write the file and print its receipt."""
    given = flags.FLAGS
    with app.bad_input():
        app.no_arguments(argv, "name the run with --workdir=DIR")
        if None in (given.workdir, given.format, given.out):
            raise ValueError("give --workdir=DIR, --format=NAME and --out=FILE")
        out = pathlib.Path(given.out)
        if out.exists():
            raise ValueError(f"--out={out} is there already; name another one, or remove it")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out={out} is in no folder that there is; make {out.absolute().parent}")
        trained = load_trained(given.workdir)
        written = export(trained, given.format, out)
    with app.bad_data():
        for line in receipt(trained, written, out):
            print(line)


def export(trained: Trained, kind: str, out: pathlib.Path) -> Run:
    """Write the model in the format `kind`, a key of FORMATS, and give back what was written, read again.

    Raises:
        ValueError: a package that the format needs is missing.
    """
    return FORMATS[kind](trained, serve(trained), out)


def serve(trained: Trained) -> Served:
    """What is exported, whatever the format: normalisation of the images and the model, folded."""
    config, task = trained.config, trained.task
    model, variables = fold(task.model, trained.model_variables)
    if "attention_impl" in family_of(model).field_types:
        model = model.clone(attention_impl="xla")  # what is fused runs on one platform alone

    def call(images: jax.Array) -> jax.Array:
        return model.apply(variables, task.normalise(images), train=False)

    info = {
        "model": config.model.name,
        "image_size": task.model.image_size,
        "crop": config.data.eval_crop,
        "interpolation": config.data.interpolation,
        "mean": list(config.task.mean),
        "std": list(config.task.std),
        "classes": trained.class_names,
    }
    return Served(call, task.model.image_size, info)


def receipt(trained: Trained, run: Run, out: pathlib.Path) -> list[str]:
    """How what was written compares with the model in JAX on all images of the evaluation, its size and its speed."""
    config = trained.config
    loader = build_loaders(config, image_size=trained.task.model.image_size).evals["eval"]
    reference = jax.jit(lambda images: trained.task.predict(*trained.variables, {"image": images}))
    rows, right, agreeing, difference = 0, np.zeros(2, int), 0, 0.0
    image = None
    for batch in loader.batches():
        real = batch["mask"]
        expected = np.asarray(reference(batch["image"]))[real]
        found = np.asarray(run(batch["image"]))[real]
        image = batch["image"][:1] if image is None else image
        difference = max(difference, float(np.abs(expected - found).max(initial=0.0)))
        best = np.stack([expected.argmax(-1), found.argmax(-1)])
        right += (best == batch["label"][real]).sum(-1)
        agreeing += int((best[0] == best[1]).sum())
        rows += int(real.sum())
    latencies = [_latency(function, image) for function in (reference, run)]
    return [
        f"{out}: {out.stat().st_size:,} bytes",
        f"largest difference of a logit: {difference:.1e}",
        f"top-1: {right[1] / rows:.2%} written, {right[0] / rows:.2%} in JAX; the same class for {agreeing} of {rows}",
        f"one image: {latencies[1]:.1f} ms written, {latencies[0]:.1f} ms in JAX, here",
    ]


def _safetensors(trained: Trained, served: Served, out: pathlib.Path) -> Run:
    from halvit_jax.convert import readers, weights_file

    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out} must end in .safetensors")
    fields = {field: value for field, value in trained.config.model.items() if value is not None}
    name = fields.pop("name")
    weights_file.save(out, name, trained.model_variables, metadata={"info": json.dumps(served.info)}, **fields)
    variables = weights_file.load_any(str(out), readers.read(out), None, {}).variables
    params = variables.pop("params")
    call = jax.jit(lambda images: trained.task.predict(params, variables, {"image": images}))
    return lambda images: np.asarray(call(images))


def _stablehlo(trained: Trained, served: Served, out: pathlib.Path) -> Run:
    del trained
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, served.image_size, served.image_size, 3), "uint8")
    exported = jax.export.export(jax.jit(served.call), platforms=PLATFORMS)(images)
    with zipfile.ZipFile(out, "x") as archive:
        archive.writestr("model.bin", bytes(exported.serialize()))
        archive.writestr("info.json", json.dumps(served.info, indent=2))
    with zipfile.ZipFile(out) as archive:
        call = jax.jit(jax.export.deserialize(bytearray(archive.read("model.bin"))).call)
    return lambda images: np.asarray(call(images))


def _onnx(trained: Trained, served: Served, out: pathlib.Path) -> Run:
    del trained
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--format=onnx needs more packages ({error}): pip install 'halvit_jax[onnx]'") from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it tells what it leaves out of every shape
    images = jax.ShapeDtypeStruct(("b", served.image_size, served.image_size, 3), "uint8")
    model = jax2onnx.to_onnx(served.call, [images], return_mode="proto")
    onnx.helper.set_model_props(model, {"info": json.dumps(served.info)})
    onnx.save(model, out)
    session = onnxruntime.InferenceSession(os.fspath(out), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


FORMATS: dict[str, Callable[[Trained, Served, pathlib.Path], Run]] = {
    "stablehlo": _stablehlo,
    "safetensors": _safetensors,
    "onnx": _onnx,
}


def _latency(run: Run | Callable[[Any], Any], image: Any) -> float:
    """Milliseconds of a call with one image."""
    run(image)
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        np.asarray(run(image))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    define_flags()
    app.run(main)
