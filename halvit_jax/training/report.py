"""Logging: TensorBoard curves, the progress line, the parameter table. Process 0 only."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from clu import metric_writers, parameter_overview

from halvit_jax.protocols import PyTree
from halvit_jax.storage import Path
from halvit_jax.text import one_line

BAR = 20  # columns of the progress bar
GRID = 8  # images along a side of the grid that TensorBoard shows


class Report:
    """Writes the curves of a run to TensorBoard files in the workdir, and one live or several plain lines to stdout.

    `progress` names the metrics of the progress line; `units` are those of `Task`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        batch_size: int,
        progress: Sequence[str] = (),
        units: Mapping[str, str] = MappingProxyType({}),
        curves: bool = True,
    ) -> None:
        self._is_primary, self._workdir = jax.process_index() == 0, workdir
        self._writer = (
            metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
            if self._is_primary and curves
            else metric_writers.MultiWriter([])
        )
        self._live = self._is_primary and sys.stdout.isatty()
        self._total_steps, self._batch_size = total_steps, batch_size
        self._progress_metrics, self._units = progress, units
        self._speeds: list[float] = []
        self._line = ""
        self._shown: tuple[float, list[str]] = (0.0, [])  # when the live line was written, and what beside the step
        self._clock = time.perf_counter()  # start of the interval since the last report, shifted by every pause
        self._waited = 0.0  # seconds of the interval spent waiting for data
        self._uncounted = 0  # steps reported with this interval that ran before it

    def log(self, text: str) -> None:
        """Print a line that the progress line does not overwrite."""
        if self._is_primary:
            print(("\r\033[K" if self._live and self._line else "") + text, flush=True)
            self._line = ""

    def parameters(self, params: PyTree) -> None:
        """Log CLU's table of all parameters to TensorBoard."""
        if self._is_primary:
            table = parameter_overview.get_parameter_overview(params, include_stats=False)
            self._write(self._writer.write_texts, 0, {"parameters": f"```\n{table}\n```"})

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """The fields of the config, as TensorBoard's hyper-parameters."""
        self._write(self._writer.write_hparams, _flat_fields(config))

    def images(self, step: int, images: Mapping[str, Any]) -> None:
        """Each stack of images [n, h, w, 3] in [0, 1] as one grid."""
        grids = {name: grid(np.asarray(stack))[None] for name, stack in images.items()}
        self._write(self._writer.write_images, step, grids)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        entered = time.perf_counter()
        yield
        self._waited += time.perf_counter() - entered

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Time spent inside (evaluating, saving) does not count as training."""
        entered = time.perf_counter()
        yield
        self._clock += time.perf_counter() - entered

    def first_step_done(self) -> None:
        """The step function is compiled; from here on the clock measures training."""
        self.log(f"first step done after {time.perf_counter() - self._clock:.1f} s, most of it compiling")
        self._clock, self._waited, self._uncounted = time.perf_counter(), 0.0, 1

    def training(self, step: int, scalars: Mapping[str, float], *, steps: int) -> None:
        """The averages over the `steps` since the last call, with speed and the share of time waiting for data."""
        now = time.perf_counter()
        counted, seconds = steps - self._uncounted, max(now - self._clock, 1e-9)
        if counted > 0:
            speed = counted * self._batch_size / seconds
            self._speeds.append(speed)
            scalars = {**scalars, "images_per_s": speed, "waiting_for_data": self._waited / seconds}
        self._write(self._writer.write_scalars, step, {f"train/{name}": value for name, value in scalars.items()})
        self._progress(step, scalars)
        self._clock, self._waited, self._uncounted = now, 0.0, 0

    def evaluation(self, step: int, name: str, scalars: Mapping[str, float | None]) -> None:
        """The metrics of one evaluation, as `name`/..., in the curves and as a printed line; None is undefined."""
        points = {f"{name}/{key}": value for key, value in scalars.items() if value is not None}
        self._write(self._writer.write_scalars, step, points)
        self.log(f"step {step}  {name}  {self._summary(scalars)}")

    @property
    def images_per_s(self) -> float | None:
        """The median training speed of this process, or None before the first report."""
        return float(np.median(self._speeds)) if self._speeds else None

    def result(self, result: Mapping[str, Any], workdir: Path) -> None:
        """The result of a run as a short table, and the commands to use it."""
        scores = {name: value for name, value in result.items() if isinstance(value, Mapping)}
        rows = [(name, self._summary(score)) for name, score in scores.items()]
        rows += [("parameters", f"{result['params']:,}"), ("steps", f"{result['step']:,}")]
        if result["images_per_s"]:
            rows.append(("training speed", f"{result['images_per_s']:,.0f} images/s"))
        folder = shlex.quote(str(workdir))
        rows.append(("run", folder))
        python = os.path.relpath(sys.executable) if sys.prefix.startswith(os.getcwd()) else "python"
        rows.append(("curves", f"{python} -m tensorboard.main --logdir={folder}"))
        rows.append(("use it", f"{python} -m halvit_jax.predict --workdir={folder} IMAGE..."))
        self.log("\n" + "\n".join(f"  {name:<18}{value}" for name, value in rows))

    def close(self) -> None:
        """Flush pending writes."""
        self._write(self._writer.close)

    def _write(self, method: Callable[..., None], *arguments: Any) -> None:
        """Write to TensorBoard's files; if that fails, as on a full disk, the run continues without curves."""
        try:
            method(*arguments)
        except Exception as error:  # any error of TensorFlow, from this write or an earlier one
            self._writer = metric_writers.MultiWriter([])
            reason = one_line(error)
            self.log(f"WARNING: no more curves: they cannot be written to {self._workdir} ({reason})")

    def _progress(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._is_primary:
            return
        shown = [self._pretty(name, scalars[name]) for name in self._progress_metrics if name in scalars]
        if "images_per_s" in scalars:
            left = (self._total_steps - step) * self._batch_size / scalars["images_per_s"]
            shown += [f"{scalars['images_per_s']:,.0f} images/s", f"data {scalars['waiting_for_data']:.0%}"]
            shown += [f"ETA {int(left) // 3600}:{int(left) % 3600 // 60:02}:{int(left) % 60:02}"]
        if self._live:  # what a narrow terminal has no place for is left out from the end on
            ordered = sorted(shown, key=lambda part: part.startswith("data") or "images/s" in part)
            self._bar("step", step, self._total_steps, ordered)
        else:
            print(self._position("step", step, self._total_steps) + "  ".join(["", *shown]), flush=True)

    def tick(self, step: int) -> None:
        """Move the live line on, at most once a second, with the metrics of the last report."""
        if self._live and time.perf_counter() - self._shown[0] > 1.0:
            self._bar("step", step, self._total_steps, self._shown[1])

    def evaluating(self, name: str, batch: int, batches: int) -> None:
        """Move the live line of an evaluation on."""
        if self._live and (batch == batches or time.perf_counter() - self._shown[0] > 0.2):
            self._bar(name, batch, batches, [], keep=self._shown[1])

    def waiting(self, text: str) -> None:
        """A live line for what takes long and has no steps, such as compiling."""
        if self._live:
            self._write_live(text)

    def _bar(self, what: str, done: int, total: int, shown: list[str], keep: list[str] | None = None) -> None:
        """A bar and what fits behind it into the terminal."""
        share = done / max(total, 1)
        bar = "#" * round(BAR * share) + "-" * (BAR - round(BAR * share))
        width, position = shutil.get_terminal_size().columns - 1, self._position(what, done, total)
        text = f"[{bar}] {position}" if len(position) + BAR + 3 <= width else position
        for part in shown:
            if len(text) + 2 + len(part) > width:
                break
            text = f"{text}  {part}"
        self._write_live(text[:width])
        self._shown = (time.perf_counter(), shown if keep is None else keep)

    def _write_live(self, text: str) -> None:
        self._line = text
        print(f"\r\033[K{text}", end="", flush=True)

    def _position(self, what: str, done: int, total: int) -> str:
        return f"{what} {done}/{total}  {done / max(total, 1):4.0%}"

    def _summary(self, scalars: Mapping[str, float | None]) -> str:
        """All metrics but those of parts, such as `box_ap/person`."""
        return "  ".join(self._pretty(key, value) for key, value in scalars.items() if "/" not in key)

    def _pretty(self, name: str, value: float | None) -> str:
        if value is None:
            return f"{name} undefined"
        return f"{name} {value:.2%}" if self._units.get(name) == "%" else f"{name} {value:.4f}"


def grid(images: np.ndarray) -> np.ndarray:
    """The first images of [n, h, w, c] side by side: [rows * h, GRID * w, c]."""
    images = images[: GRID * GRID]
    missing = -len(images) % GRID
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    rows = images.reshape(-1, GRID, *images.shape[1:])  # [rows, GRID, h, w, c]
    return rows.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * rows.shape[2], -1, rows.shape[-1])


def _flat_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields |= _flat_fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return fields
