"""Halving a vision transformer: the kernels of every block tied to what the block computes on some images.

Block by block, each on the teacher's own inputs: attention in closed form (`attention`, `biases`), the feed-forward
layer by a signed balance (`ffn`) and a short fit without labels (`fit`). All else is copied.

Shapes: `b` images, `n` tokens, `d` width, `f` hidden.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from halvit_jax.halving import attention, biases, moments
from halvit_jax.halving import fit as fitting
from halvit_jax.halving.attention import Heads, TiedHeads
from halvit_jax.halving.ffn import NormedFfn, signed_balance
from halvit_jax.halving.moments import Covariances
from halvit_jax.models.vit import VisionTransformer

PyTree = Any
COVARIANCES = ("data", "identity")


class Settings(NamedTuple):
    """How to halve; the defaults are those of the measured figures."""

    rounds: int = 25  # of the least squares, at most
    fit_steps: int = 1500  # of each tied feed-forward layer; 0: its start alone
    fit_batch: int = 512  # tokens of a step, a multiple of the devices
    learning_rate: float = 5e-3  # of the fit
    covariance: str = "data"  # one of COVARIANCES: what weights the least squares
    batch: int = 128  # images that run through the teacher at once, a multiple of the devices
    seed: int = 0  # of the tokens in the fit's steps


class Errors(NamedTuple):
    """Relative squared errors of a layer's outputs; 1 is as good as a constant, 0 exact."""

    before: float  # attention: averages of the matrices; feed-forward layer: the signed balance
    after: float


class HalvedBlock(NamedTuple):
    """The student's parameters of a block, and its errors."""

    params: PyTree
    attention: Errors
    ffn: Errors


class Unfinished(NamedTuple):
    """What a stop leaves of a block: the state of its fit, before which all is computed again."""

    block: int
    fit: fitting.FitState


class Stopped(Exception):  # noqa: N818
    """A stop was requested; the rest of the message is what is unfinished, or None between two parts."""

    def __init__(self, unfinished: Unfinished | None) -> None:
        super().__init__(unfinished)
        self.unfinished = unfinished


def halved_blocks(
    teacher: VisionTransformer,
    student: VisionTransformer,
    params: PyTree,
    images: Iterable[np.ndarray],
    settings: Settings,
    *,
    done: int = 0,
    unfinished: Unfinished | None = None,
    sharding: NamedSharding | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[HalvedBlock]:
    """The blocks of the student from number `done` on.

    Args:
        teacher: a model.
        student: another one; `checks.check_pair` lets both pass.
        params: the teacher's.
        images: batches of normalised images [b, h, w, 3], of any size.
        settings: how.
        done: blocks that exist already.
        unfinished: what a stopped call has left of block `done`.
        sharding: of an array whose first axis is the batch; None: one device.
        stop: asked between the parts of a block.

    Raises:
        Stopped: `stop` has answered True.
    """
    layers, params = _Layers(teacher, student, settings, sharding), jax.tree.map(np.asarray, params)
    tokens = np.concatenate([layers.embed(params, batch) for batch in images])
    for block in range(teacher.depth):
        if stop():
            raise Stopped(None)
        run = layers.run_block(params[f"block{block}"], tokens)
        if block >= done:
            state = unfinished.fit if unfinished and unfinished.block == block else None
            yield _halve(layers, params[f"block{block}"], tokens, run, block, state, stop)
        tokens = run.outputs


def assembled(params: PyTree, blocks: list[HalvedBlock]) -> PyTree:
    """The student's parameters: its blocks, and the teacher's own for all else."""
    rest = {name: value for name, value in params.items() if not name.startswith("block")}
    found = rest | {f"block{i}": block.params for i, block in enumerate(blocks)}
    return jax.tree.map(lambda array: np.asarray(array, np.float32), found)


class _Run(NamedTuple):
    """A teacher's block on all images."""

    middle: np.ndarray  # [b, n, d] between attention and feed-forward layer
    outputs: np.ndarray  # [b, n, d]
    covariances: Covariances  # of the attention's inputs


class _Layers:
    """The layers of both models as compiled functions of their parameters; all blocks share them."""

    def __init__(
        self, teacher: VisionTransformer, student: VisionTransformer, settings: Settings, sharding: NamedSharding | None
    ) -> None:
        self.teacher, self.student, self.settings, self.sharding = teacher, student, settings, sharding
        norm, attend, ffn = teacher.layers()
        own_norm, own_attend, own_ffn = student.layers()
        self.own_ffn = functools.partial(fitting.normed, own_norm, own_ffn)

        def block(params: PyTree, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            normed = norm.apply({"params": params["attention_norm"]}, tokens)
            middle = tokens + attend.apply({"params": params["attention"]}, normed)
            added = fitting.normed(norm, ffn, {"norm": params["ffn_norm"], "module": params["ffn"]}, middle)
            return normed, middle, middle + added

        def attended(params: PyTree, tokens: jax.Array) -> jax.Array:
            return own_attend.apply(
                {"params": params["attention"]}, own_norm.apply({"params": params["attention_norm"]}, tokens)
            )

        def embed(params: PyTree, images: jax.Array) -> jax.Array:
            return teacher.apply({"params": params}, images, method="embed_tokens")

        self._block, self._attended, self._embed = jax.jit(block), jax.jit(attended), jax.jit(embed)

    def embed(self, params: PyTree, images: np.ndarray) -> np.ndarray:
        """The inputs [b, n, d] of the first block."""
        return np.concatenate([self._batched(self._embed, params, batch) for batch in self._batches(images)])

    def run_block(self, params: PyTree, tokens: np.ndarray) -> _Run:
        """The teacher's block, and the covariances of its attention's inputs."""
        found, middle, outputs = moments.Moments(self.teacher.width), [], []
        for batch in self._batches(tokens):
            normed, between, after = self._batched(self._block, params, batch)
            found.add(normed)
            middle.append(between)
            outputs.append(after)
        identity = self.settings.covariance == "identity"
        covariances = moments.identity(self.teacher.width) if identity else found.covariances()
        return _Run(np.concatenate(middle), np.concatenate(outputs), covariances)

    def attention_error(self, params: PyTree, constant: np.ndarray, tokens: np.ndarray, middle: np.ndarray) -> float:
        """Of the student's attention with its constant, against middle - tokens."""
        left, total, squares = 0.0, np.zeros(self.teacher.width), 0.0
        for batch, after in zip(self._batches(tokens), self._batches(middle), strict=True):
            wanted = after.astype(np.float64) - batch
            left += np.sum((self._batched(self._attended, params, batch) + constant - wanted) ** 2)
            total += wanted.sum((0, 1))
            squares += np.sum(wanted**2)
        size = squares - total @ total / (tokens.shape[0] * tokens.shape[1])
        return float(left / (size or 1.0))

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        size = self.settings.batch
        return (rows[first : first + size] for first in range(0, len(rows), size))

    def _batched(self, function: Callable[..., PyTree], params: PyTree, rows: np.ndarray) -> Any:
        """`function` of some rows, filled up to a whole batch, which is split over the devices."""
        padded = np.zeros((self.settings.batch, *rows.shape[1:]), np.float32)
        padded[: len(rows)] = rows
        if self.sharding:
            whole = NamedSharding(self.sharding.mesh, PartitionSpec())
            params, padded = jax.device_put(params, whole), jax.device_put(padded, self.sharding)
        return jax.tree.map(lambda array: np.asarray(array)[: len(rows)], function(params, padded))


def _halve(
    layers: _Layers,
    params: PyTree,
    tokens: np.ndarray,
    run: _Run,
    number: int,
    state: fitting.FitState | None,
    stop: Callable[[], bool],
) -> HalvedBlock:
    """One block of the student."""
    found, constant, attention_errors = _tie_attention(layers, params, tokens, run)
    if stop():
        raise Stopped(None)
    inputs = (run.middle - constant.astype(np.float32)).reshape(-1, run.middle.shape[-1])
    targets = (run.outputs - run.middle + constant.astype(np.float32)).reshape(inputs.shape)
    ffn = _absorb(_start_ffn(layers, params), constant, run.middle)
    error = functools.partial(fitting.relative_error, layers.own_ffn, inputs=inputs, targets=targets, batch=16_384)
    before = after = error(ffn)
    tied = layers.student.ffn == "tied" != layers.teacher.ffn
    if tied and layers.settings.fit_steps:
        fitted = _fit(layers, state or ffn, inputs, targets, number, stop)
        after = error(fitted)
        ffn = fitted if after < before else ffn  # an exact start can only get worse
    found |= {"ffn_norm": ffn["norm"], "ffn": ffn["module"]}
    return HalvedBlock(found, attention_errors, Errors(before, min(before, after)))


def _tie_attention(layers: _Layers, params: PyTree, tokens: np.ndarray, run: _Run) -> tuple[PyTree, np.ndarray, Errors]:
    """The attention and its norm; the constant [d] that its output lacks; and its errors."""
    norm, given = params["attention_norm"], params["attention"]
    nothing = np.zeros(layers.teacher.width)
    if layers.student.attention == layers.teacher.attention:
        return {"attention_norm": norm, "attention": given}, nothing, Errors(0.0, 0.0)
    query, key, value = np.split(np.asarray(given["qkv"]["kernel"]), 3, axis=1)
    heads = attention.split(query, key, value, given["output"]["kernel"], num_heads=layers.teacher.num_heads)
    errors = []
    for tied in (attention.averaged(heads), attention.tie(heads, run.covariances, rounds=layers.settings.rounds)):
        own, constant = _with_biases(layers, norm, given, tied, heads, run.covariances.centred)
        errors.append(layers.attention_error(own, constant, tokens, run.middle))
    kept = nothing if layers.student.attention_bias else constant
    return own, kept, Errors(*errors)


def _with_biases(
    layers: _Layers, norm: PyTree, given: PyTree, tied: TiedHeads, heads: Heads, centred: np.ndarray
) -> tuple[PyTree, np.ndarray]:
    """The student's attention and norm, and what is left to add to its output."""
    kernels = {"query_output": {"kernel": tied.query_output}, "key_value": {"kernel": tied.key_value}}
    if "bias" not in given["qkv"]:
        return _float32({"attention_norm": norm, "attention": kernels}), np.zeros(layers.teacher.width)
    of_query, _, of_value = np.split(np.asarray(given["qkv"]["bias"], np.float64), 3)
    constant = of_value @ given["output"]["kernel"] + given["output"]["bias"]
    if layers.student.attention_bias:
        zeros = np.zeros_like(constant)
        own = {"query_bias": biases.query_bias(tied, heads, of_query, centred), "output_bias": constant}
        attended = kernels | own | {"key_bias": zeros, "value_bias": zeros}
        return _float32({"attention_norm": norm, "attention": attended}), zeros
    shift = biases.norm_shift(tied, heads, of_query, centred)
    norm = {"scale": norm["scale"], "bias": norm["bias"] + shift}
    return _float32({"attention_norm": norm, "attention": kernels}), constant - biases.shift_output(tied, shift)


def _start_ffn(layers: _Layers, params: PyTree) -> PyTree:
    """The feed-forward layer before the fit, as `fit.normed` takes it."""
    norm, given = params["ffn_norm"], params["ffn"]
    if layers.student.ffn == layers.teacher.ffn:
        return {"norm": norm, "module": given}
    expand, reduce = given["expand"], given["reduce"]
    arrays = (norm["scale"], norm["bias"], expand["kernel"], expand["bias"], reduce["kernel"], reduce["bias"])
    start = signed_balance(NormedFfn(*(np.asarray(array) for array in arrays)))
    module = {"tied": {"kernel": start.kernel}, "hidden_bias": start.hidden_bias, "bias": start.bias}
    return _float32({"norm": {"scale": start.scale, "bias": start.shift}, "module": module})


def _absorb(ffn: PyTree, constant: np.ndarray, middle: np.ndarray) -> PyTree:
    """The layer on a stream that lacks a constant [d], which it adds: its norm's bias makes up for it on average."""
    scale = np.asarray(ffn["norm"]["scale"], np.float64)
    shift = scale * (constant - constant.mean()) * np.mean(1.0 / np.std(middle, axis=-1, dtype=np.float64))
    norm = {"scale": ffn["norm"]["scale"], "bias": ffn["norm"]["bias"] + shift}
    module = dict(ffn["module"])
    if "reduce" in module:
        module["reduce"] = module["reduce"] | {"bias": module["reduce"]["bias"] + constant}
    else:
        module["bias"] = module["bias"] + constant
    return _float32({"norm": norm, "module": module})


def _fit(
    layers: _Layers,
    start: PyTree,
    inputs: np.ndarray,
    targets: np.ndarray,
    number: int,
    stop: Callable[[], bool],
) -> PyTree:
    settings = layers.settings
    lengths = {"steps": settings.fit_steps, "batch": settings.fit_batch, "learning_rate": settings.learning_rate}
    order = {"seed": settings.seed * layers.teacher.depth + number, "sharding": layers.sharding, "stop": stop}
    try:
        return fitting.fit(layers.own_ffn, start, inputs, targets, **lengths, **order)
    except fitting.Stopped as stopped:
        raise Stopped(Unfinished(number, stopped.state)) from None


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda array: np.asarray(array, np.float32), tree)
