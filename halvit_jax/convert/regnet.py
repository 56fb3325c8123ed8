"""Names of RegNets: timm's, as in the release of DeiT's teacher."""

from halvit_jax.convert.engine import Rule, batch_norm, conv, dense
from halvit_jax.models.regnet import RegNet


def rules(model: RegNet) -> tuple[Rule, ...]:
    """The table of a model, with a part for each of its stages."""
    table = [*_conv_norm("stem", "stem"), *dense("head.fc", "head")]
    for i in range(1, len(model.depths) + 1):
        # timm counts blocks from 1, we from 0, so each block has its own rules.
        for j in range(model.depths[i - 1]):
            table += _block(f"s{i}.b{j + 1}", f"stage{i}/block{j}")
    return tuple(table)


def _block(source: str, target: str) -> list[Rule]:
    table = []
    for name, ours in (("conv1", "conv1"), ("conv2", "conv2"), ("conv3", "conv3"), ("downsample", "shortcut")):
        table += _conv_norm(f"{source}.{name}", f"{target}/{ours}")
    for name, ours in (("fc1", "reduce"), ("fc2", "expand")):
        table += conv(f"{source}.se.{name}", f"{target}/squeeze_excite/{ours}")
    return table


def _conv_norm(source: str, target: str) -> list[Rule]:
    return [*conv(f"{source}.conv", f"{target}/conv"), *batch_norm(f"{source}.bn", f"{target}/norm")]
