"""Weights from the Hub, against a local server that speaks its protocol."""

import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from helpers.hub_server import COMMIT, TOKEN, Hub, serving
from helpers.official import GOLDEN, official_shapes
from helpers.pages import DOCS, text_of

import halvit_jax
from halvit_jax.convert import from_torch, hub, readers
from halvit_jax.convert.timm import official_names
from halvit_jax.convert.transfer import read_for
from halvit_jax.models import create_model, list_models
from halvit_jax.trees import flatten

TIMM = json.loads((GOLDEN / "timm_names.json").read_text())["states"]


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, which huggingface_hub uses with a cache of its own."""
    content = Hub()
    with serving(content) as url:
        _configure(monkeypatch, url, tmp_path / "cache")
        yield content


def _configure(monkeypatch: pytest.MonkeyPatch, url: str, cache: pathlib.Path, **more: object) -> None:
    from huggingface_hub import constants

    values = {
        "ENDPOINT": url,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
    }
    for name, value in (values | more).items():
        monkeypatch.setattr(constants, name, value)


def _file(arrays: dict[str, np.ndarray], folder: pathlib.Path, **metadata: str) -> bytes:
    path = folder / "made.safetensors"
    readers.write(path, arrays, metadata)
    return path.read_bytes()


@pytest.fixture
def small(server: Hub, tmp_path: pathlib.Path) -> str:
    """A repository with a small file."""
    server.files["me/small/model.safetensors"] = _file({"a": np.arange(6.0, dtype=np.float32)}, tmp_path)
    return "hf://me/small"


PUBLISHED_STATES = {
    "timm/deit_tiny_patch16_224.fb_in1k": "deit_tiny",
    "timm/shvit_s1.in1k": "shvit_s1",
    "timm/pvt_v2_b0.in1k": "pvt_v2_b0",
    "timm/resnet18.tv_in1k": "resnet18",
    "timm/swin_tiny_patch4_window7_224.ms_in1k": "swin_tiny",
    "timm/nextvit_small.bd_in1k": "nextvit_small",
}


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        pytest.param(repository, name, marks=[] if name == "shvit_s1" else pytest.mark.slow)
        for repository, name in PUBLISHED_STATES.items()
    ],
)
def test_the_golden_weights_arrive_under_the_names_of_timm_and_offline_the_second_time(
    repository: str,
    name: str,
    server: Hub,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    reference_weights: types.ModuleType,
) -> None:
    official = {entry: reference_weights.weights(entry, shape) for entry, shape in official_shapes(name).items()}
    theirs = official_names(create_model(name), {entry: entry for entry in TIMM.get(name, official)})
    state = {entry: official[own] for own, entry in theirs.items()}
    server.files[f"{repository}/model.safetensors"] = _file(state, tmp_path)
    model, variables = halvit_jax.load(f"hf://{repository}")
    assert model == create_model(name)
    wanted = from_torch(name, official)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    initial = read_for(f"hf://{repository}", name, model)  # what `init_from` reads
    jax.tree.map(np.testing.assert_array_equal, initial, flatten(wanted))
    _configure(monkeypatch, server.url, tmp_path / "cache", HF_HUB_OFFLINE=True)
    asked = len(server.requests)
    jax.tree.map(np.testing.assert_array_equal, halvit_jax.load(f"hf://{name}")[1], wanted)
    assert len(server.requests) == asked


def test_a_model_is_created_with_its_published_weights(
    server: Hub, tmp_path: pathlib.Path, reference_weights: types.ModuleType
) -> None:
    state = {entry: reference_weights.weights(entry, shape) for entry, shape in official_shapes("pvt_v2_b0").items()}
    server.files["timm/pvt_v2_b0.in1k/model.safetensors"] = _file(state, tmp_path)
    for pretrained in (True, "hf://timm/pvt_v2_b0.in1k"):
        model, variables = halvit_jax.create_model("pvt_v2_b0", pretrained=pretrained)
        assert model == create_model("pvt_v2_b0")
        jax.tree.map(np.testing.assert_array_equal, variables, from_torch("pvt_v2_b0", state))


def test_a_revision_and_a_file_are_taken_from_the_source(small: str, server: Hub) -> None:
    server.files["me/small/ema/weights.safetensors"] = server.files["me/small/model.safetensors"]
    assert readers.read(f"{small}@{COMMIT}/ema/weights.safetensors").arrays.keys() == {"a"}
    assert f"/me/small/resolve/{COMMIT}/ema/weights.safetensors" in server.requests[-1]
    assert readers.read(small).arrays.keys() == {"a"}


def test_a_redirect_to_another_host_is_followed_without_the_token(
    small: str, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Hub()
    other.files = server.files
    with serving(other) as url:
        server.elsewhere = url.replace("127.0.0.1", "localhost")
        assert readers.read(small).arrays.keys() == {"a"}
    assert any(request.startswith("GET /cdn/") for request in other.requests)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("no repository", "no such repository, or a private one"),
        ("private", "no such repository, or a private one"),
        ("gated", "its owner must grant you access"),
        ("no safetensors", "has no model.safetensors"),
        ("revision", "no revision of-no-kind"),
    ],
)
def test_what_cannot_be_fetched_is_refused_with_its_reason(fault: str, named: str, small: str, server: Hub) -> None:
    source = {"no repository": "hf://me/nothing", "revision": f"{small}@of-no-kind"}.get(fault, small)
    if fault == "private":
        server.private.add("me/small")
    elif fault == "gated":
        server.gated.add("me/small")
    elif fault == "no safetensors":
        server.files["me/small/pytorch_model.bin"] = server.files.pop("me/small/model.safetensors")
    with pytest.raises(ValueError, match=named) as refused:
        readers.read(source)
    assert str(refused.value).startswith(source)


def test_a_private_repository_is_read_with_a_token(small: str, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.private.add("me/small")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert readers.read(small).arrays.keys() == {"a"}


def test_a_transfer_that_breaks_off_is_refused_and_the_next_one_is_whole(small: str, server: Hub) -> None:
    server.truncated.add("me/small/model.safetensors")
    with pytest.raises(ValueError, match=small):
        readers.read(small)
    server.truncated.clear()
    assert readers.read(small).arrays.keys() == {"a"}


def test_a_file_of_another_digest_is_removed(small: str, server: Hub) -> None:
    server.wrong["me/small/model.safetensors"] = "0" * 64
    with pytest.raises(ValueError, match=f"{small}: its SHA-256 is .*, the Hub says {'0' * 64}"):
        readers.read(small)
    server.wrong.clear()
    assert readers.read(small).arrays.keys() == {"a"}


def test_without_a_connection_and_a_cache_the_reason_is_given(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    _configure(monkeypatch, "http://127.0.0.1:9", tmp_path / "none", HF_HUB_OFFLINE=True)
    with pytest.raises(ValueError, match="it is not in the cache, and the Hub cannot be reached"):
        readers.read("hf://me/small")


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://me/small: .*pip install 'huggingface_hub>="):
        readers.read("hf://me/small")


@pytest.mark.parametrize("source", ["hf://", "hf://a/b/c", "hf://a/b/c.bin", "hf://a b/c"])
def test_another_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"{source} is not of the form hf://OWNER/REPOSITORY"):
        hub.parse(source)


@pytest.mark.parametrize(
    ("name", "named"),
    [("mini_swin_tiny", "microsoft/Cream"), ("pvt_tiny", "whai362/PVT"), ("halvit_tiny", "none"), ("x", "deit_tiny")],
)
def test_a_model_without_a_repository_is_refused_with_the_place_of_its_weights(name: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"known for {name}; .*{named}"):
        hub.repository_of(name)


def test_the_table_names_models_that_exist() -> None:
    assert {name for name, _ in hub.PUBLISHED.values()} <= set(list_models())
    for name, fields in hub.PUBLISHED.values():
        create_model(name, **fields)


def test_a_repository_outside_the_table_must_name_its_model(small: str) -> None:
    with pytest.raises(ValueError, match="does not name its model"):
        halvit_jax.load(small)


def test_the_page_lists_every_repository_by_its_first_size() -> None:
    page = text_of(DOCS / "pytorch_weights.md")
    families = {re.sub(r"(tiny|small|base|large|b\d|s\d).*", "", name) for name in hub.PUBLISHED}
    assert {family for family in families if family not in page} == set()
