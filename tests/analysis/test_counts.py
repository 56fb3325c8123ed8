"""Exact parameter counts and multiply-accumulates: for a library about parameters, the test."""

import pytest
from helpers.tiers import CORE, tiered

from halvit_jax.analysis.counts import summarize
from halvit_jax.models import FAMILIES, baseline_of, list_models

# model -> total, without head, GMACs at its own image size, as it is trained. Those of halvit_resnet50 were counted
# without a classifier (2 M of 4.1 G), those of SHViT with the norms folded, as published; of pvt_v2_b0 fvcore counts
# 0.572 with 5 for each number that a LayerNorm sees, which are 1 % of so small a model (0.566065664 + 0.0059584), and
# are left out here.
COUNTS = {
    "deit_tiny": (5_717_416, 5_524_416, 1.258),
    "deit_small": (22_050_664, 21_665_664, 4.608),
    "deit_base": (86_567_656, 85_798_656, 17.583),
    "deit_tiny_distilled": (5_910_800, 5_524_800, 1.266),
    "deit_small_distilled": (22_436_432, 21_666_432, 4.634),
    "deit_base_distilled": (87_338_192, 85_800_192, 17.676),
    "halvit_tiny": (11_415_400, 11_030_400, 4.608),
    "halvit_small": (44_063_464, 43_294_464, 17.583),
    "deit_tiny_hc": (5_874_988, 5_681_988, 1.262),
    "deit_small_hc": (22_069_528, 21_684_528, 4.535),
    "deit_base_hc": (86_605_600, 85_836_600, 17.446),
    "halvit_tiny_h": (11_415_832, 11_030_832, 4.187),
    "halvit_small_h": (44_064_544, 43_295_544, 16.052),
    "mini_halvit_tiny": (6_133_192, 5_748_192, 4.661),
    "mini_halvit_small": (22_846_312, 22_077_312, 17.71),
    "pvt_tiny": (13_229_288, 12_716_288, 1.944),
    "pvt_small": (24_485_864, 23_972_864, 3.834),
    "pvt_medium": (44_208_104, 43_695_104, 6.686),
    "pvt_large": (61_369_320, 60_856_320, 9.851),
    "pvt_v2_b0": (3_666_760, 3_409_760, 0.566),
    "pvt_v2_b1": (14_009_000, 13_496_000, 2.120),
    "pvt_v2_b2": (25_362_856, 24_849_856, 4.046),
    "pvt_v2_b2_li": (22_553_512, 22_040_512, 3.910),
    "pvt_v2_b3": (45_238_696, 44_725_696, 6.925),
    "pvt_v2_b4": (62_556_072, 62_043_072, 10.139),
    "pvt_v2_b5": (81_956_008, 81_443_008, 11.762),
    "pvt_tiny_hc": (13_287_060, 12_774_060, 1.984),
    "pvt_small_hc": (24_638_588, 24_125_588, 3.923),
    "pvt_medium_hc": (44_623_004, 44_110_004, 6.875),
    "pvt_large_hc": (61_982_940, 61_469_940, 10.126),
    "pvt_v2_b2_hc": (25_515_580, 25_002_580, 4.134),
    "regnety_002": (3_162_996, 2_793_996, 0.2),
    "regnety_160": (83_590_140, 80_565_140, 15.96),
    "resnet18": (11_689_512, 11_176_512, 1.819),
    "resnet50": (25_557_032, 23_508_032, 4.112),
    "resnet101": (44_549_160, 42_500_160, 7.834),
    "resnext101_32x8d": (88_791_336, 86_742_336, 16.477),
    "swin_tiny": (28_288_354, 27_519_354, 4.51),
    "swin_small": (49_606_258, 48_837_258, 8.77),
    "swin_base": (87_768_224, 86_743_224, 15.47),
    "mini_deit_tiny": (3_090_304, 2_897_304, 1.282),
    "mini_deit_small": (11_450_824, 11_065_824, 4.661),
    "mini_deit_base": (44_098_408, 43_329_408, 17.71),
    "mini_swin_tiny": (12_001_765, 11_232_765, 4.62),
    "mini_swin_small": (26_463_205, 25_694_205, 8.96),
    "mini_swin_base": (46_444_852, 45_419_852, 15.75),
    "halvit_resnet50": (15_515_176, 13_466_176, 4.119),
    "halvit_resnext101_32x8d": (25_876_776, 23_827_776, 18.12),
    "nextvit_small": (31_763_368, 30_738_368, 5.811),
    "nextvit_base": (44_818_856, 43_793_856, 8.294),
    "nextvit_large": (57_874_344, 56_849_344, 10.777),
    "nextvit_small_hc": (35_015_324, 33_990_324, 6.377),
    "nextvit_base_hc": (49_499_728, 48_474_728, 9.153),
    "nextvit_large_hc": (63_984_132, 62_959_132, 11.928),
    "shvit_s1": (6_330_808, 6_009_168, 0.241),
    "shvit_s2": (11_483_072, 11_033_176, 0.366),
    "shvit_s3": (14_245_273, 13_795_377, 0.601),
    "shvit_s4": (16_588_484, 16_138_588, 0.986),
    "shvit_s1_distilled": (6_652_448, 6_009_168, 0.242),
    "shvit_s2_distilled": (11_932_968, 11_033_176, 0.366),
    "shvit_s3_distilled": (14_695_169, 13_795_377, 0.601),
    "shvit_s4_distilled": (17_038_380, 16_138_588, 0.987),
}
# A model takes seconds to trace, the deepest twenty: beside one of each family, the ones the core is about.
DEFAULT = CORE | {"halvit_small", "deit_small", "deit_tiny_hc", "resnet18", "pvt_v2_b0"}

# The same as they serve, with all norms and sums folded; every other model without batch normalisation serves as it is.
DEPLOYED = {
    "deit_tiny_hc": (4_757_548, 4_564_548, 1.0449),
    "deit_small_hc": (17_622_808, 17_237_808, 3.6642),
    "deit_base_hc": (68_864_800, 68_095_800, 13.960),
    "shvit_s1": (6_308_660, 5_987_660, 0.2414),
    "shvit_s2": (11_453_508, 11_004_508, 0.36551),
    "shvit_s3": (14_210_010, 13_761_010, 0.60071),
    "shvit_s4": (16_546_248, 16_097_248, 0.98643),
    "pvt_tiny_hc": (11_269_780, 10_756_780, 1.598),
    "pvt_small_hc": (20_765_500, 20_252_500, 3.137),
    "pvt_medium_hc": (37_658_716, 37_145_716, 5.495),
    "pvt_large_hc": (52_402_780, 51_889_780, 8.075),
}
# Of the baseline's parameters and multiply-accumulates, in percent.
SAVED = {
    "deit_tiny_hc": ("deit_tiny", 16.8, 17.0),
    "deit_small_hc": ("deit_small", 20.1, 20.5),
    "deit_base_hc": ("deit_base", 20.4, 20.6),
    "pvt_tiny_hc": ("pvt_tiny", 14.8, 17.9),
    "pvt_small_hc": ("pvt_small", 15.2, 18.3),
    "halvit_tiny": ("deit_small", 48.2, 0.0),
    "halvit_tiny_h": ("deit_small", 48.2, 9.2),
    "mini_halvit_tiny": ("deit_small", 72.2, -1.1),
    "mini_deit_tiny": ("deit_tiny", 45.9, -1.9),
}


def test_no_model_is_missing() -> None:
    assert sorted(COUNTS) == list_models()


@pytest.mark.parametrize("name", tiered(DEPLOYED, ["shvit_s1"]))
def test_counts_as_deployed(name: str) -> None:
    row = summarize(name)
    params, without_head, gmacs = DEPLOYED[name]
    assert row["params_deployed"] == params
    assert row["params_deployed_without_head"] == without_head
    assert row["gmacs_deployed"] == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", tiered(SAVED, DEFAULT))
def test_savings_against_the_baseline(name: str) -> None:
    row = summarize(name)
    assert (row["baseline"], row["params_saved"], row["gmacs_saved"]) == SAVED[name]


def test_every_baseline_is_a_model_without_a_baseline() -> None:
    baselines = {name: baseline for family in FAMILIES for name, baseline in family.baselines.items()}
    assert baselines.keys() < set(list_models())
    assert [baseline for baseline in baselines.values() if baseline_of(baseline)] == []
    assert (baseline_of("deit_base_hc"), baseline_of("halvit_tiny_h")) == ("deit_base", "deit_small")


def test_only_models_have_published_results() -> None:
    for family in FAMILIES:
        assert family.published.keys() <= family.sizes.keys()


def test_a_model_without_a_baseline_saves_nothing() -> None:
    row = summarize("deit_tiny")
    assert (row["baseline"], row["params_saved"], row["gmacs_saved"]) == (None, None, None)
    assert (row["params_deployed"], row["gmacs_deployed"]) == (row["params"], row["gmacs"])


@pytest.mark.parametrize("name", tiered(COUNTS, DEFAULT))
def test_counts(name: str) -> None:
    row = summarize(name)
    params, without_head, gmacs = COUNTS[name]
    assert row["params"] == params
    assert row["params_without_head"] == without_head
    assert row["gmacs"] == pytest.approx(gmacs, rel=0.01)
