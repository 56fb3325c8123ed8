"""Runs to be planned on as many chips as there are simulated devices, and a compiler that answers as a test asks."""

import types
from typing import Any

import jax
from ml_collections import ConfigDict

from halvit_jax.analysis import aot_plan, tpu_topology
from halvit_jax.recipes import digits

GIBIBYTE = 2**30
EIGHT = tpu_topology.Topology("v5e", (2, 4))  # as many chips as there are simulated devices


def digits_config(model: str = "halvit_tiny", **mesh: int) -> ConfigDict:
    config = digits.vit(model)
    config.mesh.update(mesh)
    return config


def prepared(config: ConfigDict) -> aot_plan.CompileTarget:
    return aot_plan.prepare(config, EIGHT, jax.devices())


HLO = "  %gathered = f32[4,32]{1,0} all-gather(f32[4,8]{1,0} %p), dimensions={1}"


class FakeLowered:
    """A lowered step that compiles to what the test wants."""

    def __init__(self, *, temporaries: int = 0, error: str = "") -> None:
        self._temporaries, self._error = temporaries, error

    def compile(self) -> Any:
        if self._error:
            raise jax.errors.JaxRuntimeError(self._error)
        sizes = {"argument": 100, "output": 60, "alias": 50, "temp": self._temporaries, "generated_code": 7}
        memory = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
        return types.SimpleNamespace(
            memory_analysis=lambda: memory,
            as_text=lambda: HLO,
            cost_analysis=lambda: {"flops": 5.0, "bytes accessed": 819e6},
        )


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.50G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
)
