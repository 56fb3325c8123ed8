"""The commands on a small detector and embedded scenes: train, stop and resume on two canvases, evaluate."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers.processes import run_command

from halvit_jax.data import scenes
from halvit_jax.experiment.trained import load_trained
from halvit_jax.main import run_experiment
from halvit_jax.recipes import detection
from halvit_jax.trees import flatten


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


@pytest.mark.slow
def test_an_image_is_searched_by_the_trained_detector(scenes_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run_experiment(_small(scenes_dir, **{"total_steps": 3, "loop.eval_every": 3}), tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    serving = trained.task.serving(trained.model_variables)
    image = np.zeros((1, 160, 192, 3), np.uint8)
    found = serving(image, np.array([[160, 192]], np.int32))
    assert found["boxes"].shape == (1, 50, 4)
    (decoded,) = trained.task.decode(found, trained.info)
    assert len(decoded["detections"]) == int(found["valid"].sum())
    assert flatten(trained.variables[0])["box_head/fc1/kernel"].shape == (7 * 7 * 16, 16)


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
