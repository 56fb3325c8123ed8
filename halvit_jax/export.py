"""Export a trained model for use elsewhere, and verify the file.

python -m halvit_jax.export --workdir=DIR --format=stablehlo|safetensors|onnx --out=FILE

The file maps uint8 images [b, s, s, 3] of any b to the model's outputs in float32; normalisation is inside, resizing is
not. The file also contains a description: the size of the images, the fraction of the resized image that the
central crop keeps (`crop`), how it is resized (`resize`, short_side or squash), and the names of the classes.

A detector's file takes the images on their canvas and their `size` there, and returns boxes in pixels of the canvas.

- stablehlo: a zip of model.bin (for `jax.export.deserialize`) and info.json; runs on CPU, GPU and TPU
- onnx: for onnxruntime and others, of the input `images` and the output `logits`; needs the extra `onnx`; the
  description is in the model's metadata
- safetensors: the parameters, each once, for `halvit_jax.load` and `--config.init_from`; the description is in its
  header

The written file is read again and compared with the model in JAX on the evaluation set, or where that cannot be read on
random images.

There is no SavedModel: TensorFlow 2.21 reads StableHLO up to version 1.13, and jax 0.10 writes 1.15.
"""

import json
import logging
import os
import pathlib
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from halvit_jax import storage
from halvit_jax.cli import app
from halvit_jax.experiment.build import build_loaders, input_size
from halvit_jax.experiment.tasks import build_task, model_name
from halvit_jax.experiment.trained import Trained, load_trained, save_trained
from halvit_jax.experiment.workdir import parse_step
from halvit_jax.models import family_of
from halvit_jax.protocols import Array, Batch, PyTree, ServingModel
from halvit_jax.text import pip_install
from halvit_jax.trees import flatten

Predictor = Callable[..., PyTree]  # what `ServingModel.inputs` names -> outputs
PLATFORMS = ("cpu", "cuda", "tpu")
RANDOM_IMAGES, RANDOM_CANVASES = 16, 2  # to compare on without an evaluation set; of detection
CALLS = 20  # the latency is their median


def define_flags() -> None:
    """Define the command-line flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of halvit_jax.main.")
    flags.DEFINE_string("step", None, "The step whose checkpoint to export, or best; else the newest.")
    flags.DEFINE_enum("format", None, list(FORMATS), "The format to write.")
    flags.DEFINE_string("out", None, "The file to write.")


def main(argv: list[str]) -> None:
    """Write the file, compare it with the model, and print the result."""
    given = flags.FLAGS
    with app.report_user_errors():
        app.reject_positional_args(argv, "name the run with --workdir=DIR")
        if None in (given.workdir, given.format, given.out):
            raise ValueError("give --workdir=DIR, --format=NAME and --out=FILE")
        if "://" in given.out:
            raise ValueError(f"--out={given.out} must be a local path; copy the file to where it belongs afterwards")
        out = pathlib.Path(given.out)
        if out.exists():
            raise ValueError(f"--out={out} exists; name another one, or remove it")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out={out} is in a folder that does not exist; create {out.absolute().parent}")
        trained = load_trained(storage.parse(given.workdir, "--workdir="), step=parse_step(given.step))
        written = export(trained, given.format, out)
    for line in verify_export(trained, written, out):
        print(line)


def export(trained: Trained, kind: str, out: pathlib.Path) -> Predictor:
    """Write the model in the format `kind`, a key of FORMATS, and return the written model, read again.

    Raises:
        ValueError: a package that the format needs is missing, or an operation that it cannot hold.
    """
    return FORMATS[kind](portable(trained), out)


def portable(trained: Trained) -> Trained:
    """The same model without platform-specific operations, such as fused attention and fused feed-forward layers."""
    model = getattr(trained.task, "model", None)
    model = getattr(model, "backbone", model)
    fields = {"attention_impl", "ffn_impl"} & set(() if model is None else family_of(model).field_types)
    if not fields:
        return trained
    config = trained.config.copy_and_resolve_references()
    config.model.update(dict.fromkeys(fields, "xla"))
    return trained._replace(task=build_task(config))


def description(trained: Trained) -> dict[str, Any]:
    """Preprocessing of images and meaning of the outputs, as plain JSON values."""
    config, info = trained.config, trained.info
    height, width = input_size(trained.task)
    if config.task.name == "detection":
        resize = {name: config.instances[name] for name in ("short_side", "long_side")}
        resize["category_ids"] = info.extra.get("category_ids")
    else:
        resize = {
            "crop": config.data.eval_crop,
            "resize": config.data.eval_resize,
            "interpolation": config.data.interpolation,
            "exif_rotation": config.data.exif_rotation,
        }
    return {
        "task": config.task.name,
        "model": model_name(config),
        "image_size": height if height == width else [height, width],
        "in_channels": trained.task.batch_spec()["image"].shape[-1],
        **resize,
        "mean": list(config.task.mean),
        "std": list(config.task.std),
        "classes": info.class_names,
    }


def verify_export(trained: Trained, written: Predictor, out: pathlib.Path) -> list[str]:
    """Compare the exported model with the JAX model on the evaluation set, in outputs, size and latency.

    Where the evaluation set cannot be read, it is compared on random images.
    """
    try:
        loader = build_loaders(trained.config, size=input_size(trained.task), training=False).evals["eval"]
        return [_size(out), *_compare(trained, written, loader.batches(), "images of the evaluation set")]
    except (ValueError, OSError) as error:  # data that are not there, or an image that cannot be decoded
        lines = _compare(trained, written, iter([_random_batch(trained.task)]), "random images")
        return [_size(out), *lines, f"not compared on the evaluation set: {error}"]


def _compare(trained: Trained, written: Predictor, batches: Iterator[Batch], what: str) -> list[str]:
    task, info = trained.task, trained.info
    serving = task.serving(trained.model_variables, folded=False)
    reference: Predictor = jax.jit(serving)
    rows, agreeing = 0, 0
    differences: dict[str, float] = {}
    first: list[Array] = []
    for batch in batches:
        inputs = [batch[name] for name in serving.inputs]
        if inputs[0].shape[1:3] != serving.input_size:
            continue  # another canvas of a detector
        first = first or [array[:1] for array in inputs]
        real = np.flatnonzero(batch["mask"])
        expected, found = (jax.tree.map(np.asarray, model(*inputs)) for model in (reference, written))
        for (name, own), other in zip(_leaves(expected).items(), jax.tree.leaves(found), strict=True):
            difference = np.abs(own[real].astype(np.float64) - other[real].astype(np.float64)).max(initial=0.0)
            differences[name] = max(differences.get(name, 0.0), float(difference))
        decoded = [[_best(row) for row in task.decode(outputs, info)] for outputs in (expected, found)]
        agreeing += sum(decoded[0][row] == decoded[1][row] for row in real)
        rows += len(real)
    latencies = [_latency(model, first) for model in (reference, written)]
    return [
        *(f"largest difference of {name}: {value:.1e}" for name, value in differences.items()),
        f"the same best answer for {agreeing} of the {rows} {what}",
        f"one image: {latencies[1]:.1f} ms exported, {latencies[0]:.1f} ms in JAX, on this machine",
    ]


def _size(out: pathlib.Path) -> str:
    return f"{out}: {out.stat().st_size:,} bytes"


def _random_batch(task: Any) -> dict[str, np.ndarray]:
    size = input_size(task)
    count = RANDOM_IMAGES if "size" not in task.batch_spec() else RANDOM_CANVASES
    images = np.random.default_rng(0).integers(0, 256, (count, *task.batch_spec()["image"].shape), np.uint8)
    return {"image": images, "size": np.tile(np.int32(size), (count, 1)), "mask": np.ones(count, bool)}


def _leaves(outputs: PyTree) -> dict[str, np.ndarray]:
    return {f"output {path}" if path else "the output": leaf for path, leaf in flatten(outputs).items()}


def _best(decoded: Any) -> Any:
    """A decoded output without its floating-point numbers and with the first item of each list only."""
    if isinstance(decoded, dict):
        return {key: _best(value) for key, value in decoded.items() if not isinstance(value, float)}
    if isinstance(decoded, list | tuple):
        return [_best(value) for value in decoded[:1] if not isinstance(value, float)]
    return decoded


def _safetensors(trained: Trained, out: pathlib.Path) -> Predictor:
    from halvit_jax.convert import readers, weights_file

    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out} must end in .safetensors")
    if trained.config.task.name == "detection":  # whose fields are those of the config
        save_trained(out, trained)
        again = load_trained(out)
        return jax.jit(again.task.serving(again.model_variables, folded=False))
    fields = {field: value for field, value in trained.config.model.items() if value is not None}
    name = fields.pop("name")
    metadata = {"info": json.dumps(description(trained))}
    weights_file.save(out, name, trained.model_variables, metadata=metadata, **fields)
    variables = weights_file.load_any(str(out), readers.read(out), None, {}).variables
    return jax.jit(trained.task.serving(variables, folded=False))


def _stablehlo(trained: Trained, out: pathlib.Path) -> Predictor:
    serving = trained.task.serving(trained.model_variables)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(serving), platforms=PLATFORMS)(*_specs(trained, serving, batch))
    with zipfile.ZipFile(out, "x") as archive:
        archive.writestr("model.bin", bytes(exported.serialize()))
        archive.writestr("info.json", json.dumps(description(trained), indent=2))
    with zipfile.ZipFile(out) as archive:
        return jax.jit(jax.export.deserialize(bytearray(archive.read("model.bin"))).call)


def _onnx(trained: Trained, out: pathlib.Path) -> Predictor:
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--format=onnx needs more packages ({error}): {pip_install('onnx')}") from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it logs a warning for each unknown dimension
    serving = trained.task.serving(trained.model_variables)
    try:
        model = jax2onnx.to_onnx(serving, _specs(trained, serving, "b"), return_mode="proto")
    except Exception as error:  # of any kind, for operations that it cannot write, such as some of detectors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--format=onnx: jax2onnx cannot write {model_name(trained.config)} ({reason}); use --format=stablehlo"
        ) from error
    structure = jax.tree.structure(jax.eval_shape(serving, *_specs(trained, serving, 1)))
    _rename(model.graph, *_tensor_names(trained.config.task.name, serving, structure))
    onnx.helper.set_model_props(model, {"info": json.dumps(description(trained))})
    onnx.save(model, out)
    session = onnxruntime.InferenceSession(os.fspath(out), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Array) -> PyTree:
        given = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True)}
        return jax.tree.unflatten(structure, session.run(None, given))

    return run


def _tensor_names(task: str, serving: ServingModel, structure: Any) -> tuple[list[str], list[str]]:
    """The names of the inputs and outputs in ONNX: images and logits, or those of several outputs."""
    outputs = flatten(jax.tree.unflatten(structure, range(structure.num_leaves)))
    only = "logits" if task in ("classification", "distillation") else "output"
    return [{"image": "images"}.get(name, name) for name in serving.inputs], [name or only for name in outputs]


def _rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give the inputs and outputs of an ONNX graph these names, wherever they are used."""
    new = dict(zip((each.name for each in (*graph.input, *graph.output)), (*inputs, *outputs), strict=True))
    for each in (*graph.input, *graph.output):
        each.name = new[each.name]
    _rename_uses(graph, new)


def _rename_uses(graph: Any, new: Mapping[str, str]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
        for attribute in node.attribute:  # the graph of a branch or a loop, of others empty
            _rename_uses(attribute.g, new)


FORMATS: dict[str, Callable[[Trained, pathlib.Path], Predictor]] = {
    "stablehlo": _stablehlo,
    "safetensors": _safetensors,
    "onnx": _onnx,
}


def _specs(trained: Trained, serving: ServingModel, batch: Any) -> list[jax.ShapeDtypeStruct]:
    spec = trained.task.batch_spec()
    return [jax.ShapeDtypeStruct((batch, *spec[name].shape), spec[name].dtype) for name in serving.inputs]


def _latency(model: Predictor, inputs: list[Array]) -> float:
    """Milliseconds of a call with one image."""
    jax.block_until_ready(model(*inputs))
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        jax.block_until_ready(model(*inputs))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    define_flags()
    app.run(main)
