"""A model with its preprocessing and classes: images as paths, arrays and Pillow's, from workdirs and files."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import Finished
from PIL import Image

import halvit_jax
from halvit_jax import export
from halvit_jax.experiment.predictor import Predictor
from halvit_jax.experiment.trained import load_trained
from halvit_jax.layers.embed import resampled


@pytest.fixture(scope="module")
def predictor(finished: Finished) -> Predictor:
    return halvit_jax.load_predictor(finished[0])


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_path_an_array_and_an_image_of_pillow_are_the_same(
    predictor: Predictor, photo: np.ndarray, tmp_path: pathlib.Path
) -> None:
    Image.fromarray(photo).save(tmp_path / "a.png")
    rows = predictor([str(tmp_path / "a.png"), tmp_path / "a.png", photo, Image.fromarray(photo)])
    assert rows == [predictor(photo)] * 4
    assert [len(row["top5"]) for row in rows] == [5] * 4
    assert predictor.labels == [str(i) for i in range(10)]
    assert predictor.preprocess(photo).shape == (8, 8, 3)
    np.testing.assert_array_equal(predictor.preprocess(photo[..., 0]), predictor.preprocess(photo[..., [0, 0, 0]]))


def test_many_images_are_run_in_batches_of_one_size(predictor: Predictor) -> None:
    images = list(np.random.default_rng(1).integers(0, 256, (7, 8, 8, 3), np.uint8))
    rows = predictor(images, batch_size=3, top=2)
    assert [len(row["top2"]) for row in rows] == [2] * 7
    assert [row["top2"][0]["class"] for row in rows] == [predictor(image)["top5"][0]["class"] for image in images]
    assert np.asarray(predictor.outputs(np.stack(images))).shape == (7, 10)


def test_an_exported_file_predicts_the_same(
    finished: Finished, predictor: Predictor, photo: np.ndarray, tmp_path: pathlib.Path
) -> None:
    export.export(load_trained(finished[0]), "safetensors", tmp_path / "model.safetensors")
    assert halvit_jax.load_predictor(tmp_path / "model.safetensors")(photo) == predictor(photo)
    with pytest.raises(ValueError, match=r"step='best' chooses a checkpoint of a workdir, and .*safetensors is none"):
        halvit_jax.load_predictor(tmp_path / "model.safetensors", step="best")
    with pytest.raises(ValueError, match=r"step=4 chooses a checkpoint of a workdir, and .*safetensors is none"):
        halvit_jax.load(tmp_path / "model.safetensors", step=4)


def test_a_step_is_chosen(finished: Finished, predictor: Predictor, photo: np.ndarray) -> None:
    assert halvit_jax.load_predictor(finished[0], step="best")(photo) == predictor(photo)
    assert halvit_jax.load_predictor(finished[0], step=4)(photo) != predictor(photo)


def test_a_file_without_a_description_is_refused(finished: Finished, tmp_path: pathlib.Path) -> None:
    from halvit_jax.convert import weights_file

    trained = load_trained(finished[0])
    fields = {name: value for name, value in trained.config.model.items() if value is not None and name != "name"}
    weights_file.save(tmp_path / "bare.safetensors", "halvit_tiny", trained.model_variables, **fields)
    with pytest.raises(ValueError, match=r"bare.safetensors does not describe its images and classes; give a workdir"):
        halvit_jax.load_predictor(tmp_path / "bare.safetensors")


@pytest.mark.parametrize("shape", [(8, 8, 4), (8,), (1, 8, 8, 3)])
def test_an_array_that_is_no_image_is_refused(predictor: Predictor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image must be uint8 \[h, w, 3\] or \[h, w\], not uint8"):
        predictor(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="not float32"):
        predictor(np.zeros((8, 8, 3), np.float32))


def test_images_of_another_size_are_seen_with_resampled_positions(
    finished: Finished, predictor: Predictor, photo: np.ndarray, tmp_path: pathlib.Path
) -> None:
    larger = halvit_jax.load_predictor(finished[0], image_size=12)
    assert larger.preprocess(photo).shape == (12, 12, 3)
    before, after = (each.variables["params"]["position"]["embedding"] for each in (predictor, larger))
    np.testing.assert_allclose(after, resampled(before, (4, 4), (6, 6)), rtol=1e-5)
    images = jnp.asarray(larger.preprocess(photo)[None], jnp.float32) / 255
    expected = larger.model.apply(larger.variables, (images - 0.5) / 0.5, train=False)
    np.testing.assert_allclose(larger.outputs(larger.preprocess(photo)[None]), expected, atol=1e-5)
    export.export(load_trained(finished[0]), "safetensors", tmp_path / "model.safetensors")
    assert halvit_jax.load_predictor(tmp_path / "model.safetensors", image_size=12)(photo) == larger(photo)
    with pytest.raises(ValueError, match=r"model.patch_size=2 does not divide model.image_size=9"):
        halvit_jax.load_predictor(finished[0], image_size=9)
