"""Speed and memory of our models, of attention's implementations, and of the machine itself."""

import concurrent.futures
import contextlib
import datetime
import functools
import importlib.metadata
import math
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import CASES, DRY_BATCH, Recorder, arguments, chosen_models, seconds_of

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax", "orbax-checkpoint", "numpy")
PROFILED = ("deit_small", "deit_small/xla", "resnet50", "shvit_s1", "swin_tiny")
THREADS = 8  # that compile at once
FINISH = jax.block_until_ready


class Job(NamedTuple):
    """One program: a model, what it does, on how many images."""

    label: str
    kind: str  # train or infer
    batch: int
    fields: dict[str, Any]


def machine(record: Recorder, dry: bool) -> None:
    """What runs here, and the two ceilings: products of bfloat16 matrices, and copies in the device's memory."""
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["nvidia_smi"] = None
    n, size = (256, 2**20) if dry else (8192, 2**30)
    keys = jax.random.split(jax.random.key(0), 2)
    left, right = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
    product = jax.jit(jnp.matmul)
    timed = seconds_of(lambda: product(left, right), FINISH, steps=20, rounds=5)
    found["matmul_bf16_tflops"] = round(2 * n**3 / timed["ms"] / 1e9, 1)
    array = jax.random.normal(keys[0], (size // 2,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    timed = seconds_of(lambda: copy(array), FINISH, steps=20, rounds=5)
    found["copy_tb_per_s"] = round(2 * size / timed["ms"] / 1e9, 3)
    for name, value in found.items():
        record("machine", name, value=value)


VARIANTS = {"xla": {"attention_impl": "xla"}}  # of a model; another variant is a patch, see `patched`
WAVES = (  # (model or model/variant, what): compiled together, then timed while nothing is compiled
    (
        *(("deit_small", "train"), ("halvit_tiny", "train"), ("deit_small/xla", "train")),
        *(("deit_small", "infer"), ("halvit_tiny", "infer"), ("deit_small/gelu_tanh", "train")),
    ),
    (("deit_base", "train"), ("halvit_small", "train"), ("shvit_s1", "train"), ("shvit_s4", "train")),
    (("swin_tiny", "train"), ("mini_deit_small", "train"), ("nextvit_small", "train"), ("resnet50", "train")),
    (("halvit_resnet50", "train"), ("resnet50", "infer"), ("halvit_resnet50", "infer"), ("shvit_s1", "infer")),
    (("shvit_s4", "infer"), ("swin_tiny", "infer"), ("deit_base", "infer"), ("halvit_small", "infer")),
    (("shvit_s2", "train"), ("shvit_s3", "train"), ("shvit_s2", "infer"), ("shvit_s3", "infer")),
    (("mini_deit_small", "infer"), ("nextvit_small", "infer")),
)


@contextlib.contextmanager
def patched(variant: str) -> Iterator[None]:
    """`gelu_tanh`: GELU through one tanh in place of the exact one, to see what erf costs."""
    from halvit_jax.layers import ffn

    exact = ffn.gelu
    if variant == "gelu_tanh":
        ffn.gelu = functools.partial(jax.nn.gelu, approximate=True)
    try:
        yield
    finally:
        ffn.gelu = exact


class Models:
    """Models of this run, traced one after the other, compiled beside each other, then timed alone."""

    def __init__(
        self, record: Recorder, *, until: float, dry: bool, work: str, profiled: tuple[str, ...] = PROFILED
    ) -> None:
        from ours import one_device

        self._record, self._until, self._dry, self._work, self._profiled = record, until, dry, work, profiled
        self._mesh = one_device()
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def run(self, jobs: list[Job]) -> None:
        """Compile all, then time all: nothing is compiled while something is timed."""
        lowered = []
        for job in jobs:
            if time.time() > self._until - 40 and not self._dry:
                self._record("models", job.label, job.kind, str(job.batch), "skipped", value="no time left")
                continue
            with (
                self._record.errors("models", job.label, job.kind, str(job.batch)),
                patched(job.label.partition("/")[2]),
            ):
                started = time.perf_counter()
                task, states, program = self._lower(job)
                traced = time.perf_counter() - started
                lowered.append((job, task, states, traced, self._pool.submit(self._compile, program)))
        concurrent.futures.wait([each[-1] for each in lowered], timeout=self._until - time.time() - 10)
        for job, task, states, traced, future in lowered:
            at = ("models", job.label, job.kind, str(job.batch))
            with self._record.errors(*at):
                compiled, compile_s = future.result(timeout=0.1)
                row = {"trace_s": round(traced, 1), "compile_s": round(compile_s, 1)}
                self._record(*at, value=row | self._timed(job, task, states, compiled))

    def _lower(self, job: Job) -> tuple[Any, Any, Any]:
        from ours import make_task, optimizer_of

        from halvit_jax.training.state import abstract_state
        from halvit_jax.training.step import abstract_batch, make_train_step

        task = make_task(job.label.split("/")[0], dtype=jnp.bfloat16, **job.fields)
        optimizer = optimizer_of(batch_size=job.batch)
        state = abstract_state(task, optimizer, mesh=self._mesh, use_ema=False)
        batch = abstract_batch(self._mesh, task.batch_spec(), batch_size=job.batch)
        if job.kind == "train":
            return task, (state, batch), make_train_step(task, optimizer, seed=0, ema_decay=0.0).lower(state, {}, batch)
        return task, (state, batch), jax.jit(task.predict).lower(state.params, state.model_state, batch)

    @staticmethod
    def _compile(program: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        return program.compile(), time.perf_counter() - started

    def _timed(self, job: Job, task: Any, states: Any, compiled: Any) -> dict[str, Any]:
        from ours import filled, noise

        from halvit_jax.analysis.hlo import memory_of
        from halvit_jax.training.sharding import bytes_of

        state, batch = filled(states[0]), noise(states[1], task.model.num_classes)
        weights = {"params_bytes": bytes_of(state.params), "optimizer_bytes": bytes_of(state.opt_state)}
        held = [state]

        def train() -> Any:
            held[0], outcome = compiled(held[0], {}, batch)
            return outcome

        def infer() -> Any:
            return compiled(held[0].params, held[0].model_state, batch)

        del state  # training gives its arrays away
        run = train if job.kind == "train" else infer
        FINISH(run())
        started = time.perf_counter()
        FINISH(run())
        steps = min(40, max(4, math.ceil(0.5 / (time.perf_counter() - started)))) if not self._dry else 2
        row = seconds_of(run, FINISH, steps=steps, rounds=1 if self._dry else 3)
        row["images_per_s"] = round(1e3 * job.batch / row["ms"], 1)
        memory = memory_of(compiled)
        row |= {"peak_bytes": memory["arguments"] + memory["temporaries"] + memory["output"], "memory": memory}
        row |= weights | costs(compiled)
        if job.kind == "train":
            outcome = run()
            row["loss"] = float(outcome.sums["loss"] / outcome.sums["examples"])
            if job.label in self._profiled and job.batch in (
                DRY_BATCH,
                CASES[job.label.partition("/")[0]].train_batches[0],
            ):
                with self._record.errors("profile", job.label):
                    folder = f"{self._work}/{job.label.replace('/', '_')}"
                    self._record("profile", job.label, value=profile(run, folder, steps=3, dry=self._dry))
        return row


def costs(compiled: Any) -> dict[str, float]:
    """What XLA itself counts of a program, where it does."""
    try:
        found = compiled.cost_analysis()
        found = found[0] if isinstance(found, list) else found
        return {"xla_flops": found.get("flops", 0.0), "bytes_accessed": found.get("bytes accessed", 0.0)}
    except Exception as error:
        return {"cost_error": str(error)[:100]}


def profile(run: Callable[[], Any], folder: str, *, steps: int, dry: bool) -> dict[str, Any]:
    """The kernels of a step by the time they take: milliseconds a step, calls a step."""
    jax.profiler.start_trace(folder)
    for _ in range(steps):
        result = run()
    FINISH(result)
    jax.profiler.stop_trace()
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    kernels: dict[str, list[float]] = {}
    seen = []
    for plane in data.planes:
        for line in plane.lines:
            seen.append(f"{plane.name}: {line.name}")
            if not dry and not (plane.name.startswith("/device:GPU") and line.name.startswith("Stream")):
                continue
            for event in line.events:
                kernels.setdefault(event.name, []).append(event.duration_ns / 1e6)
    rows = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "ms_of_all": round(sum(map(sum, kernels.values())) / steps, 3),
        "kernels": len(kernels),
        "calls": round(sum(map(len, kernels.values())) / steps, 1),
        "top": [
            {"name": name[:120], "ms": round(sum(times) / steps, 4), "calls": round(len(times) / steps, 2)}
            for name, times in rows[:40]
        ],
        "lines": seen[:20] if not kernels else [],
    }


def bench(record: Recorder, given: Any, *, second: bool) -> None:
    """Training and inference of all models: their first batches, or the second ones."""
    start = time.time()
    if not second or given.dry:
        with record.errors("machine"):
            machine(record, given.dry)
    number = int(second)
    models = Models(record, until=given.until, dry=given.dry, work=given.work)
    for wave in WAVES:
        jobs = []
        for label, kind in wave:
            name, _, variant = label.partition("/")
            if name not in chosen_models(given):
                continue
            case = CASES[name]
            fields = dict(case.dry) if given.dry else {}
            batches = case.train_batches if kind == "train" else case.infer_batches
            fields |= VARIANTS.get(variant, {})
            jobs.append(Job(label, kind, DRY_BATCH if given.dry else batches[number], fields))
        models.run(jobs)
    record("seconds", value=round(time.time() - start, 1))


def step(record: Recorder, given: Any) -> None:
    """The training step of one model alone."""
    (name,) = chosen_models(given)
    case = CASES[name]
    job = Job(name, "train", DRY_BATCH if given.dry else case.train_batches[0], dict(case.dry) if given.dry else {})
    Models(record, until=given.until, dry=given.dry, work=given.work, profiled=()).run([job])


def macs(record: Recorder, given: Any) -> None:
    """Multiply-accumulates of each model for one image. Runs on the CPU, beside the others."""
    from halvit_jax.analysis.macs import count_macs
    from halvit_jax.models import create_model

    for name in chosen_models(given):
        with record.errors(name):
            model = create_model(name, **(CASES[name].dry if given.dry else {}))
            image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
            init = functools.partial(model.init, train=False)
            variables = jax.eval_shape(init, jax.random.key(0), image)
            record(name, "macs", value=count_macs(functools.partial(model.apply, train=False), variables, image))
            count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
            record(name, "params", value=count)


SHAPES = {  # of attention: b, n, h, k, and whether a bias of position is added
    "deit_small 256x197 6x64": (256, 197, 6, 64, False),
    "deit_base 256x197 12x64": (256, 197, 12, 64, False),
    "small at 448, 64x785 6x64": (64, 785, 6, 64, False),
    "base, patches of 32, 512x50 12x64": (512, 50, 12, 64, False),
    "swin stage 1, 16384x49 3x32 with bias": (16384, 49, 3, 32, True),
    "swin stage 3, 1024x49 12x32 with bias": (1024, 49, 12, 32, True),
}


def fused(record: Recorder, given: Any) -> None:
    """Attention by each implementation, forward and backward: time, and error against float32 at highest precision."""
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    running = []
    for label, shape in SHAPES.items():
        b, n, h, k, with_bias = shape
        b = 2 if given.dry else b
        rng = np.random.default_rng(n)
        arrays = [jnp.asarray(rng.standard_normal((b, n, h * k), np.float32), jnp.bfloat16) for _ in range(4)]
        bias = jnp.asarray(rng.standard_normal((h, n, n), np.float32), jnp.bfloat16) if with_bias else None
        part = [x[:8] for x in arrays]
        expected = pool.submit(reference, part, bias, h)
        for name, attend in IMPLEMENTATIONS.items():
            with record.errors("attention", label, name):
                call = jax.jit(forward_backward(functools.partial(attend, num_heads=h)))
                programs = [pool.submit(call.lower(*each, bias).compile) for each in (arrays, part)]
                running.append((label, name, programs, arrays, bias, part, expected))
    concurrent.futures.wait(
        [each for job in running for each in (*job[2], job[-1])], timeout=0.6 * (given.until - time.time())
    )
    for label, name, (whole, small), arrays, bias, part, expected in running:
        with record.errors("attention", label, name):
            if time.time() > given.until - 3:
                break
            compiled = whole.result()
            row = seconds_of(lambda c=compiled, a=arrays, z=bias: c(*a, z), FINISH, steps=20, rounds=3)
            row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            record("attention", label, name, value=row)
            row["error"] = relative_error(small.result()(*part, bias), expected.result())
            record("attention", label, name, value=row)


def forward_backward(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(query, key, value, cotangent, bias) -> the output and all gradients."""

    def both(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array, bias: Any) -> Any:
        if bias is None:
            out, pull = jax.vjp(lambda *x: attend(*x, bias=None), query, key, value)
        else:
            out, pull = jax.vjp(lambda *x: attend(*x[:3], bias=x[3]), query, key, value, bias)
        return out, *pull(cotangent)

    return both


def plain(query: jax.Array, key: jax.Array, value: jax.Array, *, bias: Any, num_heads: int) -> jax.Array:
    """Attention as the models compute it where nothing is fused."""
    from halvit_jax.layers.attention import attention_weights, weighted_values

    add = None if bias is None else (lambda logits, query: logits + bias)
    return weighted_values(attention_weights(query, key, num_heads=num_heads, logits_fn=add), value)


def of_jax(
    query: jax.Array, key: jax.Array, value: jax.Array, *, bias: Any, num_heads: int, implementation: str, multiple: int
) -> jax.Array:
    """The package's own padded attention, which takes no bias."""
    from halvit_jax.layers.fused_attention import padded_attention

    if bias is not None:
        raise ValueError("it takes no bias")
    return padded_attention(query, key, value, num_heads=num_heads, multiple=multiple, implementation=implementation)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "plain": plain,
    "cudnn_padded_to_2": functools.partial(of_jax, implementation="cudnn", multiple=2),
    "cudnn_padded_to_8": functools.partial(of_jax, implementation="cudnn", multiple=8),
    "cudnn_padded_to_64": functools.partial(of_jax, implementation="cudnn", multiple=64),
    "jax_nn_xla": functools.partial(of_jax, implementation="xla", multiple=1),
}


def reference(arrays: list[jax.Array], bias: Any, num_heads: int) -> Any:
    """The plain formulas in float32 at the highest precision."""
    wide = [x.astype(jnp.float32) for x in arrays]
    bias = None if bias is None else bias.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return jax.jit(forward_backward(functools.partial(plain, num_heads=num_heads)))(*wide, bias)


def relative_error(found: Any, expected: Any) -> list[float]:
    """|found - expected| / |expected| of the output and each gradient."""
    pairs = zip(found, expected, strict=True)
    return [round(float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)), 6) for a, b in pairs]


if __name__ == "__main__":
    given = arguments()
    record = Recorder(given.record)
    if given.what == "macs":
        macs(record, given)
    elif given.what == "step":
        step(record, given)
    elif given.what == "fused":
        fused(record, given)
    else:
        bench(record, given, second=given.what == "more")
