"""The same models from timm in PyTorch on the same device: bfloat16 autocast, eager and `torch.compile`."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import CASES, DRY_BATCH, Recorder, arguments, chosen_models, seconds_of

DRY = {"deit_small": {"depth": 2, "img_size": 32}, "resnet50": {"layers": (1, 1, 1, 1)}}
FIRST = ("deit_small",)  # compiled before all others are run
COMPILED = ("resnet50", "deit_base", "swin_tiny", "shvit_s4", "shvit_s1", "nextvit_small")  # in this order afterwards
MORE = (  # what a first run of eight minutes may not reach
    *(("deit_small", "train", "eager"), ("resnet50", "train", "compiled"), ("swin_tiny", "train", "eager")),
    *(("shvit_s1", "train", "eager"), ("shvit_s4", "train", "eager"), ("nextvit_small", "train", "eager")),
    *(("shvit_s1", "infer", "eager"), ("shvit_s4", "infer", "eager"), ("resnet50", "infer", "eager")),
    *(("deit_base", "train", "compiled"), ("swin_tiny", "train", "compiled"), ("shvit_s1", "train", "compiled")),
)
COMPILE_SECONDS = 25  # left at least when another compilation begins


class Subject:
    """One model of timm on the device with a batch of noise."""

    def __init__(self, name: str, *, batch: int, dry: bool, device: str) -> None:
        case = CASES[name]
        fields = DRY[name] if dry else {}
        self.batch = batch
        self._device = device
        self._model = timm.create_model(case.timm, num_classes=1000, **fields).to(device)
        size = case.dry.get("image_size", 224) if dry else 224
        self._images = torch.randn(batch, 3, size, size, device=device)
        self._labels = torch.randint(1000, (batch,), device=device)
        if case.channels_last:
            self._model = self._model.to(memory_format=torch.channels_last)
            self._images = self._images.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), 1e-4, weight_decay=0.05, fused=device == "cuda")
        self._call = self._model

    def compile(self) -> None:
        """From here on the model is a compiled one."""
        self._call = torch.compile(self._model, dynamic=False)

    def prepare(self, kind: str) -> Callable[[], Any]:
        """What is timed, the model having been put into the right mode."""
        self._model.train(kind == "train")
        return self._train if kind == "train" else self._infer

    def _autocast(self) -> Any:
        return torch.autocast(self._device, dtype=torch.bfloat16)

    def _infer(self) -> Any:
        with torch.no_grad(), self._autocast():
            return self._call(self._images)

    def _train(self) -> Any:
        with self._autocast():
            loss = torch.nn.functional.cross_entropy(self._call(self._images), self._labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss


def measure(record: Recorder, given: Any, name: str, kind: str, mode: str) -> None:
    """One figure: training or inference of a model, eager or compiled."""
    if time.time() > given.until - (5 if mode == "eager" else COMPILE_SECONDS) and not given.dry:
        record("models", name, mode, kind, value={"skipped": "no time left"})
        return
    device = "cpu" if given.dry else "cuda"
    case = CASES[name]
    batch = DRY_BATCH if given.dry else case.train_batches[0] if kind == "train" else case.infer_batches[0]
    with record.errors("models", name, mode, kind):
        finish = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
        subject = Subject(name, batch=batch, dry=given.dry, device=device)
        if mode == "compiled":
            torch._dynamo.reset()
            subject.compile()
        run = subject.prepare(kind)
        started = time.perf_counter()
        finish(run())
        first_s = time.perf_counter() - started
        finish(run())
        started = time.perf_counter()
        finish(run())
        one = time.perf_counter() - started
        steps = 2 if given.dry else min(40, max(4, math.ceil(0.6 / one)))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = seconds_of(run, finish, steps=steps, rounds=1 if given.dry else 3)
        row |= {"batch": batch, "images_per_s": round(1e3 * batch / row["ms"], 1), "first_s": round(first_s, 1)}
        if device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        record("models", name, mode, kind, value=row)
    with contextlib.suppress(UnboundLocalError):
        del subject, run
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    given = arguments()
    record = Recorder(given.record)
    torch.backends.cudnn.benchmark = True
    record("versions", value={"torch": torch.__version__, "timm": timm.__version__})
    names = []
    for name in chosen_models(given):
        known = CASES[name].timm and timm.is_model(CASES[name].timm)
        if known:
            names.append(name)
        else:
            record("models", name, "skipped", value="not in timm" if not CASES[name].timm else "not in this timm")
    run = functools.partial(measure, record, given)
    if given.what == "torch_more":
        for name, kind, mode in MORE:
            if name in names:
                run(name, kind, mode)
        return
    first = [name for name in names if name in FIRST]
    for name in first:
        for mode in ("eager", "compiled"):
            run(name, "train", mode)
            run(name, "infer", mode)
    for kind in ("train", "infer"):
        for name in names:
            if name not in first:
                run(name, kind, "eager")
    for name in [each for each in COMPILED if each in names]:
        run(name, "train", "compiled")
    for name in [each for each in COMPILED if each in names]:
        run(name, "infer", "compiled")


if __name__ == "__main__":
    main()
