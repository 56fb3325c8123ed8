"""The page docs/terminal.md: what a person sees of a run in terminals of two widths, in a pipe and in a file."""

import os
import pathlib
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from helpers.pages import DOCS, ROOT, blocks

from halvit_jax.training.report import Report

PAGE = (DOCS / "terminal.md").read_text()
COMMAND = " ".join(blocks(PAGE, "bash")[0].replace("\\\n", " ").split())
NARROW, WIDE, PIPE = blocks(PAGE, "text")[:3]
BUILDING = "opening the data and building halvit_tiny"  # printed by the command, the rest by the report
SPEEDS = {20: 613.0, 40: 741.0, 60: 795.0, 80: 912.0, 100: 861.0, 120: 1209.0}
TRAINED = {20: (2.3202, 0.1102), 40: (2.2434, 0.1406), 60: (2.1968, 0.1762)}
TRAINED |= {80: (2.1192, 0.2152), 100: (2.1148, 0.2004), 120: (2.0648, 0.2008)}
EVALUATED = {60: (2.1539, 0.2088, 0.7088), 120: (2.0322, 0.2747, 0.7253)}
AVERAGED = {60: (2.2583, 0.1456, 0.6099), 120: (2.1720, 0.2225, 0.6621)}
BATCH = 128


@pytest.mark.parametrize(("columns", "block"), [(80, NARROW), (200, WIDE), (None, PIPE)])
def test_the_page_shows_what_the_report_prints(
    columns: int | None,
    block: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: columns is not None)
    monkeypatch.setattr("sys.prefix", "/elsewhere")
    if columns:
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))
    units = {"top1": "%", "top5": "%"}
    report = Report(tmp_path, total_steps=120, batch_size=BATCH, progress=("loss", "top1"), units=units, curves=False)
    report.waiting("compiling the training step")
    now[0] += 8.8
    report.first_step_done()
    result = {}
    for step, (loss, top1) in TRAINED.items():
        counted = 19 if step == 20 else 20
        started, now[0] = now[0], now[0] + counted * BATCH / SPEEDS[step]
        monkeypatch.setattr(report, "_waited", 0.04 * (now[0] - started))
        report.training(step, {"loss": loss, "top1": top1}, steps=20)
        if step in EVALUATED:
            with report.pausing():
                for name, values in (("eval", EVALUATED), ("ema_eval", AVERAGED)):
                    report.evaluating(name, 3, 3)
                    result[name] = dict(zip(("loss", "top1", "top5"), values[step], strict=True))
                for name, scalars in result.items():
                    report.evaluation(step, name, scalars)
    report.result({**result, "params": 116_458, "step": 120, "images_per_s": 828.0}, pathlib.Path("runs/seen"))
    printed = capsys.readouterr().out
    lines = [line for line in re.split(r"\r\033\[K|\n", printed) if line]
    assert [BUILDING] * bool(columns) + lines == [line for line in block.splitlines() if line]
    assert all(len(line) < (columns or 200) for line in lines)
    report.close()


def _masked(line: str) -> str:
    """The line without what differs between two runs."""
    return re.sub(r"[#-]{20}", "BAR", re.sub(r"[\d,]*\d(\.\d+)?(:\d\d)*", "N", re.sub(r" +", " ", line))).strip()


def _seen(columns: int, words: list[str], folder: pathlib.Path, environment: dict[str, str]) -> str:
    """All that the command writes to a terminal of this width, errors too."""
    own, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(words, cwd=folder, env=environment, stdin=other, stdout=other, stderr=other)
    os.close(other)
    written = b""
    while True:
        try:
            written += (part := os.read(own, 65536))
        except OSError:  # the other end is closed
            break
        if not part:
            break
    os.close(own)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.slow
def test_a_run_in_a_terminal_a_pipe_and_a_file_shows_these_lines_and_no_others(tmp_path: pathlib.Path) -> None:
    """From the first call, which makes the digits too, to the end."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("COLUMNS", None)
    for columns, block in ((80, NARROW), (200, WIDE)):
        more = [f"--workdir=runs/{columns}", f"--config.data.data_dir={tmp_path}/tfds"]
        written = _seen(columns, [sys.executable, *shlex.split(COMMAND)[1:], *more], tmp_path, environment)
        frames = [line.rstrip("\r") for line in re.split(r"\r\033\[K|\r?\n", written) if line.strip()]
        assert all(len(line) < columns for line in frames)
        allowed = {_masked(line) for line in block.splitlines() if line}
        partial = {mask[:end] for mask in allowed for end in range(len(mask) + 1)}  # a live line before its metrics
        wrong = [line for line in frames if _masked(line).replace(f"runs/{columns}", "runs/seen") not in partial]
        assert [line for line in wrong if "runs/" not in line] == []
        masks = {_masked(line) for line in frames}
        assert {"[BAR] eval N/N N%", "[BAR] ema_eval N/N N%", "compiling the training step"} <= masks
        assert any(mask.startswith("[BAR] step N/N N% loss N topN N%") for mask in masks)
    target = tmp_path / "log.txt"
    more = [f"--workdir={tmp_path}/piped", f"--config.data.data_dir={tmp_path}/tfds"]
    with target.open("w") as file:
        words = [sys.executable, *shlex.split(COMMAND)[1:], *more]
        done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = [_masked(line) for line in target.read_text().splitlines() if line.strip() and "/piped" not in line]
    assert found == [_masked(line) for line in PIPE.splitlines() if line and "runs/seen" not in line]
