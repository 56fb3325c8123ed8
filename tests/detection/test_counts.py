"""Parameters of every detector with 80 classes, against published totals and counts of the reference code."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.tiers import tiered

from halvit_jax.detection import MaskRCNN, RetinaNet
from halvit_jax.models import create_model
from halvit_jax.trees import count

# backbone as a detector uses it, with the norms it gets there; Mask R-CNN; RetinaNet
COUNTS: dict[str, tuple[int, int] | tuple[int, int, int]] = {
    "halvit_tiny": (11_030_016, 30_639_856),
    "halvit_small": (43_293_696, 63_198_448),
    "pvt_tiny": (12_714_752, 32_882_160, 22_964_724),
    "pvt_small": (23_971_328, 44_138_736, 34_221_300),
    "pvt_medium": (43_693_568, 63_860_976, 53_943_540),
    "pvt_large": (60_854_784, 81_022_192, 71_104_756),
    "pvt_v2_b0": (3_409_760, 23_446_096, 12_947_028),
    "pvt_v2_b1": (13_496_000, 33_663_408, 23_745_972),
    "pvt_v2_b2": (24_849_856, 45_017_264, 35_099_828),
    "pvt_v2_b3": (44_725_696, 64_893_104, 54_975_668),
    "pvt_v2_b4": (62_043_072, 82_210_480, 72_293_044),
    "pvt_v2_b5": (81_443_008, 101_610_416, 91_692_980),
    "swin_tiny": (27_520_698, 47_794_602, 38_458_798),
    "swin_small": (48_838_602, 69_112_506, 59_776_702),
    "mini_swin_tiny": (11_234_109, 31_508_013, 22_172_209),
    "mini_swin_small": (25_695_549, 45_969_453, 36_633_649),
    "nextvit_small": (30_736_320, 51_124_912, 42_378_932),
    "resnet18": (11_176_512, 31_327_536, 21_410_100),
    "resnet50": (23_508_032, 44_396_336, 37_968_692),
    "resnet101": (42_500_160, 63_388_464, 56_960_820),
    "halvit_resnet50": (13_466_176, 34_354_480, 27_926_836),
    "shvit_s4": (16_138_588, 37_416_524, 25_483_344),
}
NECKS = {"shvit": "shvit", "halvit": "plain"}  # else an FPN


def _params(kind: type, name: str, neck: str) -> Any:
    backbone = create_model(name, num_classes=0)
    model = kind(backbone, neck=neck, feature_norms="swin" in name)
    given = jnp.zeros((1, 256, 320, 3)), jnp.asarray([[256, 320]])
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *given))["params"]


@pytest.mark.parametrize("name", tiered(list(COUNTS), {"halvit_tiny"}))
def test_counts_of_detectors(name: str) -> None:
    backbone, *totals = COUNTS[name]
    neck = "fpn" if "resnet" in name else NECKS.get(name.partition("_")[0], "fpn")
    for kind, total in zip((MaskRCNN, RetinaNet), totals, strict=False):
        params = _params(kind, name, neck)
        assert count(params["backbone"]) + count(params.get("norms", {})) == backbone
        assert count(params) == total
