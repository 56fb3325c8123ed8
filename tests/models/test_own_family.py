"""A model family of somebody's own: one module and one `Family`, registered, and everything covers it."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import contract
from helpers.runs import tiny

import halvit_jax
from halvit_jax import export, main, models, summary
from halvit_jax.analysis.counts import summarize
from halvit_jax.convert import weights_file
from halvit_jax.experiment.trained import load_trained
from halvit_jax.layers.batch_norm import norms_in_evaluation
from halvit_jax.layers.conv import ConvNorm
from halvit_jax.layers.remat import run_block
from halvit_jax.models.family import Family, Published
from halvit_jax.models.partition import COLUMNS, FILTERS, VECTORS
from halvit_jax.training.sharding import make_mesh, partition
from halvit_jax.trees import flatten, variable_shapes


class Block(nn.Module):
    """x += relu(norm(conv(x))): [b, h, w, c] -> [b, h, w, c]."""

    folded: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = ConvNorm(x.shape[-1], 3, dtype=self.dtype, folded=self.folded, name="conv")
        return x + nn.relu(conv(x, train=train))


class PlainNet(nn.Module):
    """A stem of stride 4, residual blocks, and a classifier."""

    width: int = 64
    depth: int = 4
    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
    dtype: Any = None
    remat: bool = False
    folded: bool = False

    def setup(self) -> None:
        common = {"dtype": self.dtype, "folded": self.folded}
        self.stem = ConvNorm(self.width, 7, 4, **common)
        self.blocks = [Block(**common, name=f"block{i}") for i in range(self.depth)]
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, dtype=jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = self.features(images, train=train)[4].mean((1, 2), dtype=jnp.float32)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, *, train: bool, frozen_norms: bool = False) -> dict[int, jax.Array]:
        with norms_in_evaluation(frozen_norms):
            x = self.stem(images, train=train)
            for block in self.blocks:
                x = run_block(block, x, remat=self.remat, train=train)
        return {4: x}


FAMILY = Family(
    model=PlainNet,
    sizes={"plain_net": {}, "plain_net_half": {"depth": 2}},
    partition_rules=((r"conv/kernel$", FILTERS), (r"head/kernel$", COLUMNS), VECTORS),
    transfer_rules=((r"^head/", "head"), (r"^stem/conv/kernel$", "input_channels")),
    tiny={"width": 8, "depth": 2, "image_size": 32},
    published={"plain_net": Published(12.3, "nobody")},
    baselines={"plain_net_half": "plain_net"},
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    models.FAMILIES.append(FAMILY)
    yield
    models.FAMILIES.remove(FAMILY)


@pytest.mark.parametrize("check", contract.CHECKS)
def test_the_contract_covers_it(check: str) -> None:
    contract.CHECKS[check]("plain_net")


def test_the_models_are_listed_and_created_by_name() -> None:
    assert {"plain_net", "plain_net_half"} < set(halvit_jax.list_models())
    assert halvit_jax.create_model("plain_net_half") == PlainNet(depth=2)
    with pytest.raises(ValueError, match="did you mean 'plain_net'"):
        halvit_jax.create_model("plain_nett")


def test_summary_counts_it_and_compares_it_with_its_baseline() -> None:
    row = summarize("plain_net_half")
    stem, block, head = 7 * 7 * 3 * 64 + 2 * 64, 3 * 3 * 64 * 64 + 2 * 64, 64 * 1000 + 1000
    assert row["params"] == stem + 2 * block + head
    assert row["params_deployed"] == row["params"] - 3 * 64  # a bias in the place of a scale and a bias
    assert row["gmacs"] == round((56 * 56 * (7 * 7 * 3 * 64 + 2 * 9 * 64 * 64) + 64 * 1000) / 1e9, 3)
    assert row["baseline"] == "plain_net"
    assert row["published"] is None
    text = summary.markdown({name: summarize(name) for name in FAMILY.sizes})
    assert text.startswith("### PlainNet")
    assert "top-1 12.3 (nobody)" in text


def test_its_parameters_shard_by_its_partition_rules() -> None:
    model = contract.tiny_model("plain_net")
    params = variable_shapes(model)["params"]
    shardings = flatten(partition(params, models.partition_rules(model), make_mesh(fsdp=8, data=1)))
    assert shardings["block0/conv/conv/kernel"].spec[-1] == "fsdp"
    assert shardings["block0/conv/norm/scale"].is_fully_replicated


def test_capture_sees_its_blocks() -> None:
    model = contract.tiny_model("plain_net")
    variables = contract.variables_of(model)
    found = halvit_jax.capture(model, variables, contract.images_of(model), ("blocks",))["blocks"]
    assert {name: array.shape for name, array in found.items()} == dict.fromkeys(("block0", "block1"), (4, 8, 8, 8))


def test_its_weights_are_saved_and_loaded(tmp_path: pathlib.Path) -> None:
    variables = contract.variables_of(contract.tiny_model("plain_net"))
    weights_file.save(tmp_path / "net.safetensors", "plain_net", variables, num_classes=contract.CLASSES, **FAMILY.tiny)
    model, loaded = halvit_jax.load(tmp_path / "net.safetensors")
    assert model.depth == 2
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.slow
def test_a_run_trains_it_and_export_takes_it_out(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny(digits_dir)
    config.model.update(dict.fromkeys(config.model) | {"name": "plain_net", "width": 8, "depth": 1, "num_classes": 10})
    config.model.image_size = 8
    main.run_experiment(config, tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    predict = export.export(trained, "stablehlo", tmp_path / "net.zip")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    expected = trained.task.predict(*trained.variables, {"image": images})
    np.testing.assert_allclose(predict(images), expected, rtol=1e-4, atol=1e-4)
