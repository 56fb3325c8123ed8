import pathlib
import re
import shutil
import subprocess
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import Finished, tiny

from halvit_jax.experiment import page
from halvit_jax.main import run_experiment
from halvit_jax.protocols import DatasetInfo, ServingModel

NAMES = ["ant", "bee & wasp", "cat"]


class Known:
    """A task whose model answers with the first pixels of an image."""

    def serving(self, variables: Any) -> ServingModel:
        return ServingModel(lambda _, images: jnp.asarray(images[:, 0, :, 0], jnp.float32), variables, (4, 3))


def batches() -> list[dict[str, np.ndarray]]:
    images = np.zeros((4, 4, 3, 3), np.uint8)
    for row, taken in enumerate((0, 2, 1, 0)):
        images[row, 0, taken, 0] = row + 1
    rows = {"image": images, "label": np.array([0, 1, 2, 0]), "name": np.array([b"a", b"b", b"c", b"d"])}
    return [{**rows, "mask": np.array([True, True, True, False])}] * 2


@pytest.mark.parametrize(("images", "counts"), [(100, [2, 2, 2]), (5, [2, 2, 1])])
def test_mistakes_are_counted_on_the_first_images_and_the_surest_come_first(images: int, counts: list[int]) -> None:
    found = page.find_mistakes(Known(), {}, batches(), NAMES, images)
    assert found.confusion.sum(1).tolist() == counts
    assert found.confusion.diagonal().tolist() == [2, 0, 0]
    assert found.images == sum(counts)
    assert found.worst[0][1:4] == ("c", "cat", "bee & wasp")
    sure = [each.probability for each in found.worst]
    assert sure == sorted(sure, reverse=True)
    assert len(sure) == sum(counts) - 2


def test_only_so_many_mistakes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "TILES", 1)
    assert [each.name for each in page.find_mistakes(Known(), {}, batches(), NAMES, 100).worst] == ["c"]


def _page(curves: dict[str, page.Curve], mistakes: page.Mistakes | None = None) -> str:
    config = tiny(pathlib.Path("data"), **{"model.width": 48})
    result = {"step": 1200, "params": 4321, "images_per_s": None, "eval": {"top1": 0.5, "loss": None}}
    return page.page(
        pathlib.Path("a run"),
        config=config,
        info=DatasetInfo(NAMES, 6, "pets"),
        result=result,
        curves=curves,
        mistakes=mistakes,
    )


def test_a_page_has_scores_settings_and_commands_and_refers_to_nothing_outside() -> None:
    text = _page({})
    for part in (
        "halvit_tiny on pets",
        "top1 0.5, loss undefined",
        "4,321",
        "1,200",
        "model.width",
        "--workdir=&#x27;a run&#x27;",
    ):
        assert part in text, part
    assert "Mistakes" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_curves_of_one_metric_share_a_chart_and_keep_their_ends() -> None:
    long = [(step, 1.0 / step) for step in range(1, 2001)]
    text = _page({"train/loss": long, "eval/loss": [(2000, 0.25), (1000, float("nan"))], "eval/top1": [(2000, 0.75)]})
    assert text.count("<svg") == 2
    drawn = re.search(r'points="([^"]+)"', text)[1].split()
    assert len(drawn) == page.POINTS + 1
    assert drawn[0] == f"{page.LEFT:.1f},40.0"  # the highest value, at the first step
    assert drawn[-1] == f"{page.WIDTH:.1f},{page.HEIGHT - page.BOTTOM:.1f}"
    assert "train 0.0005" in text
    assert "eval 0.25" in text
    assert "nan" not in text


def test_mistakes_are_shown_with_their_image_and_a_matrix() -> None:
    found = page.find_mistakes(Known(), {}, batches(), NAMES, 100)
    text = _page({}, found)
    assert "4 of 6 images" in text
    assert "cat, taken for bee &amp; wasp" in text
    assert text.count('src="data:image/png;base64,') == 4
    assert text.count("<td style=") == 9
    many = page.Mistakes(np.zeros((31, 31), int), [], 0)
    assert "Confusion matrix" not in "".join(page._mistakes(many, [str(i) for i in range(31)]))


def test_a_finished_run_has_its_page(finished: Finished, digits_dir: pathlib.Path, workdir: pathlib.Path) -> None:
    """The run ends again at once, and its page is made of what lies in the workdir."""
    assert (finished[0] / "report.html").is_file()
    (workdir / "report.html").unlink()
    config = tiny(digits_dir, **{"loop.eval_every": 8, "report_images": 100})
    result = run_experiment(config, workdir)
    text = (workdir / "report.html").read_text()
    wrong = int(re.search(r"<p>(\d+) of 100 images", text)[1])
    assert text.count("<figure>") == min(wrong, page.TILES)
    curves = page.read_curves(workdir)
    assert curves["ema_eval/top1"][-1] == (8, pytest.approx(result["ema_eval"]["top1"]))
    assert [step for step, _ in curves["train/loss"]] == [2, 4, 6, 8]


def test_a_page_that_cannot_be_written_is_a_warning(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "report.html").unlink()
    (workdir / "report.html.unfinished").mkdir()
    run_experiment(tiny(digits_dir, **{"loop.eval_every": 8}), workdir)
    assert "WARNING: report.html is not written: " in capsys.readouterr().out


@pytest.mark.slow  # of the browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_all_of_the_page_in_the_width_of_its_window(width: int, tmp_path: pathlib.Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    found = page.find_mistakes(Known(), {}, batches(), NAMES, 100)
    (tmp_path / "report.html").write_text(_page({"train/loss": [(1, 2.0), (2, 1.0)]}, found))
    measure = (
        "const body = document.querySelector('iframe').contentDocument.documentElement;"
        "document.title = [body.scrollWidth <= body.clientWidth, body.querySelectorAll('img').length,"
        " [...body.querySelectorAll('img')].every(image => image.naturalWidth == 3)].join(' ')"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="report.html" style="border:0" width="{width}" onload="{measure}"></iframe>')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run([browser, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>true 4 true</title>" in shown.stdout
