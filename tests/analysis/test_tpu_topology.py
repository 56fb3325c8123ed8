from typing import Any

import jax
import pytest

from halvit_jax.analysis import tpu_topology

GIBIBYTE = 2**30


def test_a_topology_is_a_kind_and_a_layout() -> None:
    topology = tpu_topology.parse_topology("v4:2x2x4")
    assert topology == tpu_topology.Topology("v4", (2, 2, 4))
    assert str(topology) == "v4:2x2x4"
    assert topology.chip.hbm_bytes == 32 * GIBIBYTE
    sizes = {kind: chip.hbm_bytes // GIBIBYTE for kind, chip in tpu_topology.CHIPS.items()}
    assert sizes == {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
    assert all(0.95 < chip.usable_bytes / chip.hbm_bytes < 1.01 for chip in tpu_topology.CHIPS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-16", "must be KIND:LAYOUT"),
        ("v5e:4x", "must be KIND:LAYOUT"),
        ("v9:4x4", "'v9' is an unknown kind of TPU; kinds are v4, v5e, v5p, v6e, tpu7x"),
        ("v5e:4x4x4", "must have 2 lengths for this kind, e.g. v5e:4x4"),
        ("v4:4x4", "must have 3 lengths for this kind, e.g. v4:4x4x4"),
        ("v5e:32x32", "has 1024 chips; v5e has 1 to 256"),
        ("v6e:0x4", "has 0 chips"),
        ("v6e:3x4", "every length must be 1 or even"),
    ],
)
def test_a_wrong_topology_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"--topology=") as error:
        tpu_topology.parse_topology(text)
    assert message in str(error.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
        tpu_topology.tpu_devices(tpu_topology.Topology("v5e", (2, 4)))


def test_a_topology_that_libtpu_refuses_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def refuse(**given: Any) -> None:
        assert given["topology_name"] == "v5p:2x4x4"
        assert given["chips_per_host_bounds"] == (2, 2, 1)
        assert given["chip_config_name"] == "megacore"
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing\nmore")

    asked = ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    for name in asked:
        monkeypatch.setenv(name, "of this test")  # and put back after it
    monkeypatch.setenv("TPU_LIBRARY_PATH", "somewhere")
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=r"--topology=v5p:2x4x4: libtpu refuses it: INVALID_ARGUMENT: no such thing$"):
        tpu_topology.tpu_devices(tpu_topology.parse_topology("v5p:2x4x4"))
