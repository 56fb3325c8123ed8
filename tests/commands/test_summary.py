"""The tables of `python -m halvit_jax.summary`."""

from types import SimpleNamespace

import pytest

from halvit_jax import summary
from halvit_jax.models import list_models
from halvit_jax.protocols import ExitCode

ROW = {
    "model": "halvit_tiny",
    "params": 1234,
    "params_without_head": 1000,
    "gmacs": 0.5,
    "params_deployed": 1200,
    "gmacs_deployed": 0.25,
    "image_size": 224,
    "baseline": "deit_small",
    "params_saved": 48.2,
    "gmacs_saved": 0.0,
    "published": {"params": "11.1M", "top1": 77.3, "source": "HaLViT, T"},
}


def test_the_table_has_every_figure() -> None:
    (_, line) = summary.table([ROW]).splitlines()
    counts = ["1,234", "1,000", "0.500", "1,200", "0.250", "224", "48.2", "%", "0.0", "%", "deit_small"]
    assert line.split()[:12] == ["halvit_tiny", *counts]
    assert line.endswith("11.1M, top-1 77.3 (HaLViT, T)")
    lone = ROW | {"baseline": None, "published": None}
    assert summary.table([lone]).splitlines()[1].split() == ["halvit_tiny", *counts[:6]]


def test_two_formats_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(summary.flags, "FLAGS", SimpleNamespace(json=True, markdown=True))
    with pytest.raises(SystemExit) as ended:
        summary.main(["summary"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: --json and --markdown: give one of them\n"


def test_markdown_has_a_table_for_each_family() -> None:
    text = summary.markdown({"halvit_tiny": ROW, "pvt_tiny": ROW | {"model": "pvt_tiny", "params_deployed": 1234}})
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### VisionTransformer", "### PVT"]
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    saved = "48.2 %, 0.0 % of `deit_small`"
    published = "11.1M, top-1 77.3 (HaLViT, T)"
    config = "`configs/halvit_tiny.py`"
    assert cells == ["`halvit_tiny`", "1,234", "1,200", "0.250", "224", saved, published, config]
    assert "the same" in lines[-1]


def test_every_config_of_imagenet_trains_a_model() -> None:
    configs = summary.configs_by_model()
    assert configs.keys() <= set(list_models())
    assert configs["halvit_tiny"] == "configs/halvit_tiny.py"
    assert configs["deit_base"] == "configs/deit_base.py"
    assert configs["pvt_small"] == "configs/pvt.py:small"
