"""What the parts of the check share: records, clocks and the list of models. No framework is imported here."""

import argparse
import contextlib
import json
import os
import statistics
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A model of ours with its batches and its name in timm, if that has it."""

    train_batches: tuple[int, ...]  # the first in the first pass
    infer_batches: tuple[int, ...]
    timm: str = ""
    channels_last: bool = False
    dry: Mapping[str, Any] = types.MappingProxyType({})  # fields that make it small


DRY_VIT = {"depth": 2, "image_size": 32}
DRY_CONV = {"image_size": 64, "depths": (1, 1, 1, 1)}
CASES = {  # the most wanted first
    "deit_small": Case((256, 512), (512, 1024), "deit_small_patch16_224", dry=DRY_VIT),
    "halvit_tiny": Case((256, 512), (512, 1024), dry=DRY_VIT),
    "deit_base": Case((256, 128), (512, 256), "deit_base_patch16_224", dry=DRY_VIT),
    "halvit_small": Case((256, 128), (512, 256), dry=DRY_VIT),
    "resnet50": Case((256, 512), (512, 1024), "resnet50", True, dry=DRY_CONV),
    "halvit_resnet50": Case((256, 512), (512, 1024), dry={"image_size": 64}),
    "shvit_s1": Case((1024, 2048), (2048, 4096), "shvit_s1", True),
    "shvit_s4": Case((512, 1024), (1024, 2048), "shvit_s4", True),
    "swin_tiny": Case((256, 128), (512, 256), "swin_tiny_patch4_window7_224"),
    "mini_deit_small": Case((256, 128), (512, 256), dry=DRY_VIT),
    "nextvit_small": Case((256, 128), (512, 256), "nextvit_small", True),
    "shvit_s2": Case((1024, 2048), (2048, 4096), "shvit_s2", True),
    "shvit_s3": Case((512, 1024), (1024, 2048), "shvit_s3", True),
}
DRY_CASES = ("deit_small", "halvit_tiny", "resnet50")
DRY_BATCH = 4


def arguments() -> argparse.Namespace:
    """What the driver tells a part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--record", required=True, help="file of JSON lines to append to")
    parser.add_argument("--until", type=float, default=float("inf"), help="time.time() to be done by")
    parser.add_argument("--models", default="")
    parser.add_argument("--work", default="", help="a folder for what is not kept")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args()


class Recorder:
    """Appends results to a file, one JSON object a line, so that a kill loses nothing: {"at": [...], "value": ...}."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *at: str, value: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"at": at, "value": value}, default=str) + "\n")
        shown = json.dumps(value, default=str)
        print(f"[{time.strftime('%H:%M:%S')}] {'/'.join(at)} {shown[:300]}", flush=True)

    @contextlib.contextmanager
    def errors(self, *at: str) -> Iterator[None]:
        """An error inside becomes the result, and what follows goes on."""
        try:
            yield
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} in {place.name}, line {place.lineno}: {' '.join(str(error).split())}"
            self(*at, "error", value=text[:600])


def seconds_of(run: Callable[[], Any], finish: Callable[[Any], Any], *, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of one of many calls in a row: the median over the rounds, and all of them."""
    finish(run())  # warms up
    finish(run())
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps):
            result = run()
        finish(result)
        times.append((time.perf_counter() - started) / steps)
    return {"ms": round(1e3 * statistics.median(times), 4), "rounds_ms": [round(1e3 * t, 4) for t in times]}


def chosen_models(given: argparse.Namespace) -> list[str]:
    """The models of this run in the order of CASES."""
    names = DRY_CASES if given.dry else tuple(CASES)
    wanted = given.models.split(",") if given.models else names
    return [name for name in CASES if name in wanted]


def merge(records: str) -> dict[str, Any]:
    """The tree of all results that the lines of a file hold."""
    tree: dict[str, Any] = {}
    if not os.path.exists(records):
        return tree
    with open(records) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):  # the last one may have been cut
                entry = json.loads(line)
                *path, last = entry["at"]
                node = tree
                for name in path:
                    node = node.setdefault(name, {})
                node[last] = entry["value"]
    return tree
