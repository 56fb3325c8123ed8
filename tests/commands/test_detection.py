"""The commands on a small detector and embedded scenes: train, stop and resume on two canvases, evaluate."""

import json
import pathlib
import re
import zipfile
from typing import Any

import jax
import numpy as np
import pytest
from helpers.processes import run_command
from PIL import Image

import halvit_jax
from halvit_jax import export
from halvit_jax.convert import readers, weights_file
from halvit_jax.data import scenes
from halvit_jax.experiment import init_from
from halvit_jax.experiment.tasks import build_task
from halvit_jax.experiment.trained import load_trained
from halvit_jax.main import run_experiment
from halvit_jax.recipes import detection
from halvit_jax.trees import flatten, sha256


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A few scenes, written once."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SPLITS", {"train": (1, 48), "val": (2, 6)})
        scenes.prepare(str(folder))
    return folder


def _small(folder: pathlib.Path, **changes: Any) -> Any:
    """The run on the scenes made small: a narrow block, and canvases for wide and for high images."""
    config = detection.scenes("mask_rcnn", "halvit_tiny")
    config.update_from_flattened_dict(
        {
            "total_steps": 6,
            "batch_size": 8,  # one image on each of the tests' devices
            "loop.log_every": 2,
            "loop.eval_every": 6,
            "loop.checkpoint_every": 3,
            "loop.ema_decay": 0.9,
            "model.width": 32,
            "model.depth": 1,
            "model.num_heads": 2,
            "model.drop_path": 0.2,
            "instances.data_dir": str(folder),
            "instances.canvases": ((160, 192), (192, 192)),
            "detection.width": 16,
            "detection.hidden": 16,
            "detection.mask_depth": 1,
            "detection.test_candidates": 40,
            "detection.test_proposals": 20,
            "detection.train_candidates": 40,
            "detection.train_proposals": 20,
            "detection.score_threshold": 0.01,
            "optim.warmup_steps": 2,
            "optim.milestones": (0.7,),
        }
        | changes
    )
    return config


@pytest.mark.slow
def test_a_detector_trains_resumes_bitwise_and_is_evaluated(scenes_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = run_experiment(_small(scenes_dir), tmp_path / "whole")
    assert {"box_ap", "mask_ap", "box_ap50", "mask_ap_small", "box_ap/0"} <= whole["eval"].keys()
    assert whole["ema_eval"].keys() == whole["eval"].keys()
    assert whole["eval"]["box_ap_large"] is None  # no scene has a large digit
    # Killed in the middle of an epoch: what is left is the checkpoint of step 3.
    stopped = run_experiment(_small(scenes_dir, **{"total_steps": 3}), tmp_path / "broken")
    assert stopped["step"] == 3
    resumed = run_experiment(_small(scenes_dir), tmp_path / "broken", resume_changed=True)
    assert resumed["params_sha256"] == whole["params_sha256"]
    again = run_experiment(_small(scenes_dir), tmp_path / "whole", mode="eval", detections=str(tmp_path / "found.json"))
    assert again["eval"] == whole["eval"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(entry.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"} for entry in found)
    assert {entry["category_id"] % 2 for entry in found} <= {1}


@pytest.fixture(scope="module")
def workdir(scenes_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The run of a detector of three steps."""
    folder = tmp_path_factory.mktemp("run")
    run_experiment(_small(scenes_dir, **{"total_steps": 3, "loop.eval_every": 3}), folder)
    return folder


@pytest.mark.slow
def test_predict_prints_and_draws_detections_in_pixels_of_the_file(
    workdir: pathlib.Path, scenes_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from matplotlib import image as pictures

    image = next((scenes_dir / scenes.NAME).rglob("val/*.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = (str(image), str(tmp_path / "bad.png"))
    printed = run_command("halvit_jax.predict", f"--workdir={workdir}", f"--draw={tmp_path}/out", *files, code=1).stdout
    found, bad = (json.loads(line) for line in printed.splitlines())
    assert bad["error"].startswith(f"{files[1]} is not an image that can be read")
    first, *_ = found["detections"]
    assert first.keys() == {"class", "category_id", "bbox", "score", "segmentation"}
    height, width = pictures.imread(image).shape[:2]
    assert first["segmentation"]["size"] == [height, width]
    drawn = pictures.imread(tmp_path / "out" / f"{image.stem}.png")
    assert max(drawn.shape[:2]) == 480  # pixels: small images are enlarged
    # In Python: paths, arrays and images of Pillow give what the command printed.
    predictor = halvit_jax.load_predictor(workdir)
    pixels = (255 * pictures.imread(image)[..., :3]).round().astype(np.uint8)
    assert predictor(image) == {"detections": found["detections"]}
    assert predictor([pixels, Image.fromarray(pixels)]) == [predictor(image)] * 2
    assert predictor.labels == [str(n) for n in range(10)]
    with pytest.raises(ValueError, match=r"an image must be uint8 \[h, w, 3\] or \[h, w\], not float32"):
        predictor(pixels.astype(np.float32))
    with pytest.raises(ValueError, match=r"instances.canvases=.* hold no image of 400 x 400"):
        predictor(np.zeros((400, 400), np.uint8))


@pytest.mark.slow
def test_an_exported_detector_finds_the_same(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "detector.zip"
    trained = load_trained(workdir)
    logged = "\n".join(export.verify_export(trained, export.export(trained, "stablehlo", out), out))
    assert re.search(r"the same best answer for (\d+) of the \1 images of the evaluation set", logged), logged
    assert "largest difference of output labels: 0.0e+00" in logged
    with zipfile.ZipFile(out) as archive:
        call = jax.export.deserialize(bytearray(archive.read("model.bin"))).call
        info = json.loads(archive.read("info.json"))
    assert (info["model"], info["image_size"]) == ("mask_rcnn_halvit_tiny", [160, 192])
    assert info["category_ids"] == [2 * n + 1 for n in range(10)]
    assert (info["short_side"], info["long_side"]) == (0, 1333)
    images = np.random.default_rng(0).integers(0, 256, (2, 160, 192, 3), np.uint8)
    size = np.array([[160, 192], [128, 160]], np.int32)
    expected, found = trained.task.serving(trained.model_variables)(images, size), jax.jit(call)(images, size)
    assert found["boxes"].shape == (2, 50, 4)
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["masks"], expected["masks"], atol=1e-4)


@pytest.mark.slow
def test_a_detector_in_a_file_serves_as_its_run_and_initialises_another(
    workdir: pathlib.Path, scenes_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "detector.safetensors"
    trained = load_trained(workdir)
    logged = export.verify_export(trained, export.export(trained, "safetensors", out), out)
    assert "largest difference of output boxes: 0.0e+00" in logged
    model, variables = halvit_jax.load(out)
    assert type(model).__name__ == "MaskRCNN"
    assert sha256(variables) == sha256(halvit_jax.load(workdir)[1])
    image = np.random.default_rng(0).integers(0, 256, (160, 192, 3), np.uint8)
    assert halvit_jax.load_predictor(out)(image) == halvit_jax.load_predictor(workdir)(image)
    config = _small(scenes_dir, **{"init_from": str(out)})
    arrays = init_from.read_for_task(config, build_task(config)).arrays
    assert sha256(arrays) == sha256(flatten(variables))
    with pytest.raises(
        ValueError, match="the file is of the detector 'mask_rcnn_halvit_tiny', and no model of its own"
    ):
        weights_file.load(out)
    narrow = readers.read(out)
    narrow.arrays.pop("params/rpn/conv/kernel")
    readers.write(tmp_path / "narrow.safetensors", narrow.arrays, narrow.metadata)
    with pytest.raises(ValueError, match=r"do not fit mask_rcnn_halvit_tiny(.|\n)*missing: params/rpn/conv/kernel"):
        halvit_jax.load(tmp_path / "narrow.safetensors")


def test_detections_are_written_by_an_evaluation_of_detection_alone(tmp_path: pathlib.Path) -> None:
    for arguments in (["--mode=train"], ["--mode=eval"]):
        ended = run_command(
            "halvit_jax.main",
            "--config=configs/halvit_digits.py",
            f"--workdir={tmp_path}",
            f"--detections={tmp_path}/a.json",
            *arguments,
            code=2,
        )
        assert "a.json is for --mode=eval of task.name='detection'" in ended.stderr
