from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halvit_jax.tasks import mixup

B, H, W, C = 4, 12, 16, 4
DRAWS = 2000
# Pixel values tell image, row and column apart; the batch's order is its class.
IMAGES = jnp.arange(1.0, B * H * W + 1).reshape(B, H, W, 1) * jnp.ones((1, 1, 1, 3))
TARGETS = jnp.eye(C)
KEYS = jax.random.split(jax.random.key(0), DRAWS)


def _many(function: Callable[..., tuple[jax.Array, jax.Array]], **keywords: float) -> tuple[np.ndarray, np.ndarray]:
    """Images and targets of many draws: [draws, b, h, w], [draws, b, c]."""
    images, targets = jax.jit(jax.vmap(lambda key: function(key, IMAGES, TARGETS, **keywords)))(KEYS)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    return np.asarray(images[..., 0]), np.asarray(targets)


def _is_rectangle(box: np.ndarray) -> bool:
    return bool((box == box.any(1)[:, None] & box.any(0)[None, :]).all()) and all(
        np.diff(np.flatnonzero(side)).max(initial=1) == 1 for side in (box.any(0), box.any(1))
    )


@pytest.fixture(scope="module")
def mixed() -> tuple[np.ndarray, np.ndarray]:
    return _many(mixup.mixup, alpha=0.8)


@pytest.fixture(scope="module")
def cut() -> tuple[np.ndarray, np.ndarray]:
    return _many(mixup.cutmix, alpha=1.0)


def test_mixup_blends_a_batch_with_its_reverse_in_one_proportion(mixed: tuple[np.ndarray, np.ndarray]) -> None:
    images, targets = mixed
    lam = targets[:, 0, 0][:, None, None, None]
    plain = np.asarray(IMAGES[..., 0])
    np.testing.assert_allclose(images, lam * plain + (1 - lam) * plain[::-1], rtol=1e-4)
    expected = lam[..., 0] * np.eye(C) + (1 - lam[..., 0]) * np.eye(C)[::-1]
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_mixups_proportion_follows_its_beta_distribution(mixed: tuple[np.ndarray, np.ndarray]) -> None:
    lam = mixed[1][:, 0, 0]
    assert lam.mean() == pytest.approx(0.5, abs=0.03)
    assert lam.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.08)


def test_cutmix_pastes_one_rectangle_of_the_reversed_batch(cut: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = cut
    plain = np.asarray(IMAGES[..., 0])
    pasted = images != plain
    np.testing.assert_array_equal(images, np.where(pasted, plain[::-1], plain))
    assert (pasted == pasted[:, :1]).all()
    assert all(_is_rectangle(box) for box in pasted[:, 0])
    assert pasted[:, 0].any(0).all()  # no place is out of reach


def test_cutmix_targets_are_the_areas_really_pasted(cut: tuple[np.ndarray, np.ndarray]) -> None:
    images, targets = cut
    share = (images != np.asarray(IMAGES[..., 0]))[:, 0].mean((1, 2))
    np.testing.assert_allclose(targets[:, 0, 0], 1 - share, atol=1e-6)
    np.testing.assert_allclose(targets[:, 0, -1], share, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)
    assert 0.15 < share.mean() < 0.5  # half of the area, less what the edges cut off and rounding down


def test_with_both_alphas_zero_nothing_changes() -> None:
    images, targets = mixup.mixup_or_cutmix(KEYS[0], IMAGES, TARGETS, mixup_alpha=0.0, cutmix_alpha=0.0, switch=0.5)
    assert images is IMAGES
    assert targets is TARGETS


def test_a_group_of_rows_is_mixed_as_a_batch_of_its_own() -> None:
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.5}
    images = jax.random.uniform(jax.random.key(3), (16, 8, 8, 1))
    mix = jax.jit(lambda *arrays: mixup.mixup_or_cutmix(*arrays, **keywords))
    mixed, targets = jax.jit(lambda *arrays: mixup.mixup_or_cutmix(*arrays, **keywords, group=4))(
        KEYS[0], images, jnp.eye(16)
    )
    for number, key in enumerate(jax.random.split(KEYS[0], 4)):
        rows = slice(4 * number, 4 * number + 4)
        own, wanted = mix(key, images[rows], jnp.eye(16)[rows])
        np.testing.assert_allclose(mixed[rows], own, rtol=1e-6)
        np.testing.assert_allclose(targets[rows], wanted, rtol=1e-6)
    shares = np.asarray(targets).max(1).reshape(4, 4)
    assert np.ptp(shares, axis=1).max() < 1e-6
    assert len(set(shares[:, 0].round(4).tolist())) == 4


@pytest.mark.parametrize("group", [0, 4, 7])
def test_a_group_of_no_fewer_rows_is_the_whole_batch(group: int) -> None:
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.5}
    whole = mixup.mixup_or_cutmix(KEYS[0], IMAGES, TARGETS, **keywords)
    jax.tree.map(
        np.testing.assert_array_equal, mixup.mixup_or_cutmix(KEYS[0], IMAGES, TARGETS, **keywords, group=group), whole
    )


def test_a_group_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classification.mix_group=3 must divide the 4 rows of a batch"):
        mixup.mixup_or_cutmix(KEYS[0], IMAGES, TARGETS, mixup_alpha=1.0, cutmix_alpha=0.0, switch=0.5, group=3)


def test_an_alpha_of_zero_leaves_that_kind_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(mixup, name, lambda key, *, alpha, name=name, **_: (name, alpha))
    arguments = (KEYS[0], IMAGES, TARGETS)
    assert mixup.mixup_or_cutmix(*arguments, mixup_alpha=0.8, cutmix_alpha=0.0, switch=1.0) == ("mixup", 0.8)
    assert mixup.mixup_or_cutmix(*arguments, mixup_alpha=0.0, cutmix_alpha=1.0, switch=0.0) == ("cutmix", 1.0)


def test_with_both_the_switch_is_the_probability_of_cutmix_and_the_key_decides() -> None:
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.2}
    many = jax.jit(jax.vmap(lambda key: mixup.mixup_or_cutmix(key, IMAGES, TARGETS, **keywords)[0][..., 0]))
    images, plain = np.asarray(many(KEYS)), np.asarray(IMAGES[..., 0])
    cut = ((images == plain) | (images == plain[::-1])).all((1, 2, 3))
    assert cut.mean() == pytest.approx(0.2, abs=0.04)
    np.testing.assert_array_equal(many(KEYS), images)
    assert (np.asarray(many(KEYS[::-1])) != images).any()


def test_every_image_can_be_mixed_on_its_own() -> None:
    """In one batch some images are cut and some blended, each with its own number, and its target says which."""
    b = 64
    images = jax.random.uniform(jax.random.key(3), (b, 16, 16, 1))
    targets = jax.nn.one_hot(jnp.arange(b), b)
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.5, "per_image": True}
    mixed, new = (np.asarray(a) for a in mixup.mixup_or_cutmix(KEYS[0], images, targets, **keywords))
    plain, partner = np.asarray(images), np.asarray(images)[::-1]
    own = new[np.arange(b), np.arange(b)]
    np.testing.assert_allclose(own + new[np.arange(b), np.arange(b)[::-1]], 1.0, rtol=1e-6)
    pasted = mixed == partner
    cut = (pasted | (mixed == plain)).all((1, 2, 3))
    assert 0.25 < cut.mean() < 0.75
    assert len(set(own.round(5))) > b / 2
    np.testing.assert_allclose(own[cut], 1 - pasted[cut].mean((1, 2, 3)), atol=1e-6)
    lam = own[~cut][:, None, None, None]
    np.testing.assert_allclose(mixed[~cut], lam * plain[~cut] + (1 - lam) * partner[~cut], atol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_one_kind_alone_is_drawn_for_every_image_too(kind: str) -> None:
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | {f"{kind}_alpha": 1.0}
    targets = jax.nn.one_hot(jnp.arange(len(IMAGES)), 99)
    _, new = mixup.mixup_or_cutmix(KEYS[0], IMAGES, targets, **alphas, switch=0.5, per_image=True)
    assert len(set(np.asarray(new).max(1).round(4).tolist())) > 1


def test_mixing_keeps_the_type_of_the_images() -> None:
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch": 0.5}
    images = IMAGES.astype(jnp.bfloat16)
    mixed, targets = jax.eval_shape(lambda: mixup.mixup_or_cutmix(KEYS[0], images, TARGETS, **keywords))
    erased = jax.eval_shape(lambda: mixup.random_erase(KEYS[0], images, probability=0.5))
    assert (mixed.dtype, targets.dtype, erased.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


# Random erasing, on images large enough that rounding does not hide the proportions.
SIZE = 40


@pytest.fixture(scope="module")
def erased() -> np.ndarray:
    images = jnp.full((DRAWS, SIZE, SIZE, 3), 100.0)
    return np.asarray(jax.jit(lambda key: mixup.random_erase(key, images, probability=0.25))(KEYS[0]))


def test_erasing_fills_the_same_rectangle_with_zero(erased: np.ndarray) -> None:
    erase = jax.jit(lambda key: mixup.random_erase(key, jnp.full(erased.shape, 100.0), probability=0.25, fill="zero"))
    np.testing.assert_array_equal(erase(KEYS[0]), np.where(erased != 100.0, 0.0, 100.0))


def test_erasing_fills_one_rectangle_with_normal_noise_and_leaves_the_rest(erased: np.ndarray) -> None:
    boxes = erased != 100.0
    assert (boxes == boxes[..., :1]).all()
    assert all(_is_rectangle(box) for box in boxes[..., 0])
    noise = erased[boxes]
    assert noise.mean() == pytest.approx(0.0, abs=0.02)
    assert noise.std() == pytest.approx(1.0, abs=0.02)


def test_erasing_happens_to_its_share_of_the_images(erased: np.ndarray) -> None:
    assert (erased != 100.0).any((1, 2, 3)).mean() == pytest.approx(0.25, abs=0.03)


def test_erased_boxes_have_timms_areas_and_aspects_and_reach_every_place(erased: np.ndarray) -> None:
    boxes = (erased != 100.0).any(-1)
    boxes = boxes[boxes.any((1, 2))]
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    areas = heights * widths / SIZE**2
    assert areas.min() >= 0.02 * 0.85  # rounding to whole pixels
    assert areas.max() <= 1 / 3 * 1.05
    assert max(heights.max(), widths.max()) < SIZE  # a longer box is drawn again
    ratios = heights / widths
    assert 0.25 < ratios.min() < 0.4
    assert 2.5 < ratios.max() < 4.0
    assert np.log(ratios).mean() == pytest.approx(0.0, abs=0.1)
    assert boxes.any((0, 1)).all()
    assert boxes.any((0, 2)).all()


def test_a_box_that_never_fits_erases_nothing() -> None:
    flat = jnp.full((32, 1, 90, 1), 100.0)  # every box is at least a pixel high
    erased = jax.jit(lambda: mixup.random_erase(KEYS[0], flat, probability=1.0))()
    np.testing.assert_array_equal(erased, flat)


def test_a_box_that_does_not_fit_is_drawn_again() -> None:
    """On an image of 1 to 8 few boxes fit at the first attempt; after ten more images are erased than after one."""
    narrow = jnp.full((256, 10, 80, 1), 100.0)
    counts = []
    for attempts in (1, mixup.ERASE_ATTEMPTS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixup, "ERASE_ATTEMPTS", attempts)
            erased = jax.jit(lambda: mixup.random_erase(KEYS[0], narrow, probability=1.0))()
        counts.append(float((erased != 100.0).any((1, 2, 3)).mean()))
    assert counts[0] < 0.9
    assert counts[1] > 0.99


def test_erasing_with_probability_zero_changes_nothing() -> None:
    assert mixup.random_erase(KEYS[0], IMAGES, probability=0.0) is IMAGES
