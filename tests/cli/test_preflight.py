"""The dry run of a config: every line of it."""

import json
import os
import pathlib
import re
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_coco
from helpers.runs import tiny
from helpers.workdirs import listing
from ml_collections import ConfigDict

from halvit_jax import data
from halvit_jax.cli import preflight
from halvit_jax.config import default_config
from halvit_jax.experiment import lock

Capsys = pytest.CaptureFixture[str]


def small(digits_dir: pathlib.Path, **changes: Any) -> ConfigDict:
    """The finished run's, of any batch size."""
    return tiny(digits_dir, **{"loop.eval_every": 8, "recipe_batch_size": 0} | changes)


def tried(
    config: ConfigDict, workdir: pathlib.Path | None, capsys: Capsys, *, code: int = 2, whole: bool = False
) -> list[str]:
    """The lines of a preflight that ends with this code; unless whole, without what takes long: compiling, batches."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(preflight, "_batches", lambda data: preflight.CheckResult("none was read"))
        assert preflight.preflight(config, workdir, compile_step=whole) == code
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], verdict: str, name: str) -> str:
    """What was logged of one item."""
    (found,) = [line for line in lines if line.split()[:2] == [verdict, name]]
    return found


def test_a_good_config_passes_every_check(
    digits_dir: pathlib.Path, done: pathlib.Path, tmp_path: pathlib.Path, capsys: Capsys
) -> None:
    lines = tried(small(digits_dir), tmp_path / "new" / "run", capsys, code=0, whole=True)
    logged = [tuple(line.split()[:2]) for line in lines[:-1]]
    names = "config model devices data dataset batches images optimizer state workdir space lock checkpoint step"
    assert logged == [("ok", name) for name in names.split()]
    assert lines[-1] == "all is well"
    assert re.search(r"halvit_tiny, [\d,]+ parameters, images of 8x8, float32", line_of(lines, "ok", "model"))
    assert line_of(lines, "ok", "devices").endswith(
        "8 of the 8 devices (cpu), mesh data=8 fsdp=1 tensor=1, 4 examples of a batch on each"
    )
    assert "1,433 images to train on, 364 in eval; 44 steps an epoch, 8 in all" in line_of(lines, "ok", "data")
    assert line_of(lines, "ok", "dataset").endswith("10 classes of 139 to 146 images")
    assert re.search(r"train 32x8x8x3 in [\d.]+ s, eval 32x8x8x3 in", line_of(lines, "ok", "batches"))
    assert line_of(lines, "ok", "workdir").endswith("does not exist; the run will create it")
    assert line_of(lines, "ok", "checkpoint").endswith("none yet; the run starts at step 0")
    step = r"compiled in [\d.]+ s; needs [\d,.]+ MiB on a device, of which [\d,.]+ MiB only while it runs; [\d,.]+ MiB"
    assert re.search(step, line_of(lines, "ok", "step"))
    assert not (tmp_path / "new").exists()  # nothing was written

    before = listing(done)
    lines = tried(small(digits_dir), done, capsys, code=0)
    assert listing(done) == before
    assert line_of(lines, "ok", "checkpoint").endswith("that of step 8 fits; --workdir alone verifies it")
    assert "finished at step 8 of 8 and would only be evaluated" in line_of(lines, "warn", "checkpoint")
    assert line_of(lines, "skip", "step").endswith("left out by --no_compile")


FAILS: dict[str, tuple[dict[str, Any], str, str]] = {
    "config": ({"loop.eval_every": 0}, "loop.eval_every=0 must be at least 1", ""),
    "model": ({"model.num_heads": 5}, "model.num_heads=5 does not divide model.width=32", "state needs model"),
    "devices": (
        {"batch_size": 30},
        "batch_size=30 does not divide over mesh.data x mesh.fsdp = 8 devices; set it to 24 or 32",
        "state needs devices",
    ),
    "data": (
        {"data.name": "mnist"},
        "data.name='mnist' is not prepared in data.data_dir=.*; prepare it with: ",
        "batches needs data",
    ),
    "dataset": ({"model.num_classes": 12}, "model.num_classes=12, but data.name='digits' has 10 classes; set", ""),
    "optimizer": ({"optim.name": "adam"}, "optim.name='adam' is not one of adamw, lamb, sgd", "state needs optimizer"),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_failed_check_is_named_and_hides_no_other(name: str, digits_dir: pathlib.Path, capsys: Capsys) -> None:
    changes, message, skipped = FAILS[name]
    lines = tried(small(digits_dir, **changes), None, capsys)
    assert re.search(message, line_of(lines, "FAIL", name))
    assert lines[-1] == f"FAIL: {name}"
    assert skipped in [" ".join(line.split()[1:]) for line in lines if line.startswith("skip")] + [""]
    for other in FAILS.keys() - {name, "data", "dataset"}:
        line_of(lines, "ok", other)


def test_the_data_of_detection_are_described_before_anything_is_compiled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    config = default_config()
    config.task.name = "detection"
    config.instances.update(small_coco.write(tmp_path, small_coco.content()))
    config.instances.update({"canvases": ((64, 64),), "short_side": 0})
    config.batch_size = 1
    monkeypatch.setattr(preflight, "MAX_COUNTED", 2)
    task = types.SimpleNamespace(check_dataset=lambda info: None)
    items = preflight.Checklist()
    loaders = preflight.build.build_loaders(config, size=(64, 64))
    assert items.run("dataset", preflight._dataset, config=config, model=task, data=loaders)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "dataset"]] * len(lines)
    text = "\n".join(lines)
    for words in ("train: no ground truth: none", "eval: objects a class: dog 2, cat 3, bird 2", "eval: 2 images were"):
        assert words in text, text


def _first(content: dict[str, Any], **fields: Any) -> None:
    content["annotations"][0].update(fields)


SPOILED: dict[str, tuple[Any, str, str]] = {  # what is done to a good file, the verdict on its data, and words of it
    "outside": (lambda c: _first(c, bbox=[70, 5, 9, 9]), "ok", "no ground truth: 1 outside its image"),
    "no area": (lambda c: _first(c, bbox=[5, 5, 0, 9]), "ok", "no ground truth: 1 of no area"),
    "two points": (
        lambda c: _first(c, segmentation=[[1, 1, 5, 5]]),
        "ok",
        "no ground truth: 1 without a mask; 1 polygons of fewer than 3 points or of an odd number of coordinates",
    ),
    "leaving": (lambda c: _first(c, bbox=[30, 5, 90, 9]), "ok", "1 boxes that leave their image, clipped"),
    "corners": (
        lambda c: [entry.update(bbox=[10, 10, 32, 32], iscrowd=0) for entry in c["annotations"]],
        "FAIL",
        r"boxes leave their images as COCO's \(x, y, width, height\), and all fit as \(x1, y1, x2, y2\)",
    ),
    "unknown category": (
        lambda c: _first(c, category_id=4),
        "FAIL",
        "1 annotations have a category_id that categories",
    ),
    "twice": (lambda c: _first(c, id=2), "FAIL", "annotation ids that are there more than once: 2"),
    "image twice": (lambda c: c["images"][1].update(id=100), "FAIL", "image ids that are there more than once: 100"),
    "NaN": (lambda c: _first(c, bbox=[1, float("nan"), 3, 4]), "FAIL", "a bbox that is not finite: annotation 1"),
    "NaN in a polygon": (
        lambda c: _first(c, segmentation=[[1, float("nan"), 3, 4, 5, 6]]),
        "FAIL",
        "annotation 1 has a broken segmentation",
    ),
    "broken RLE": (
        lambda c: _first(c, segmentation={"size": [60, 40], "counts": [5]}),
        "FAIL",
        "annotation 1 has a broken segmentation: an RLE of 5 pixels on an image of 60 x 40",
    ),
    "0 images": (lambda c: c["images"].clear(), "FAIL", "0 images; there is nothing to learn from it"),
    "missing image": (
        lambda c: c["images"][1].update(file_name="no.png"),
        "FAIL",
        "lacks 1 of the 7 images .*: no.png",
    ),
    "too many": (
        lambda c: c["annotations"].extend([small_coco.box(101, [1, 1, 9, 9]) | {"id": 50 + n} for n in range(9)]),
        "FAIL",
        "instances.max_objects=8 is less than the 10 objects on image 101 of .*; raise it to 10",
    ),
    "rotated": (
        lambda c: c["images"][1].update(height=40, width=60),
        "FAIL",
        "1.png has 60 rows and 40 columns, but .* says 40 and 60; its sides are swapped: an EXIF orientation",
    ),
    "other categories": (
        lambda c: c["categories"].append({"id": 4, "name": "cow"}),
        "FAIL",
        "must have the same categories; only one of them has 4 cow",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_input_of_detection_is_counted_in_one_line_before_anything_is_compiled(
    case: str, tmp_path: pathlib.Path, capsys: Capsys
) -> None:
    spoil, verdict, words = SPOILED[case]
    good, content = small_coco.content(), small_coco.content()
    config = default_config()
    config.task.name, config.batch_size = "detection", 1
    fields = small_coco.write(tmp_path, content, good)  # images as the good file lists them
    spoil(content)
    (tmp_path / "train.json").write_text(json.dumps(content))
    config.instances.update({"canvases": ((64, 64),), "short_side": 0, "max_objects": 8, **fields})
    task, items = types.SimpleNamespace(check_dataset=lambda info: None), preflight.Checklist()
    loaders = items.run("data", preflight._data, config=config, size=(64, 64))
    items.run("dataset", preflight._dataset, config=config, model=task, data=loaders)
    (found,) = [line for line in capsys.readouterr().out.splitlines() if re.search(words, line)]
    assert found.split()[0] == verdict


def test_two_wrong_things_are_both_named(digits_dir: pathlib.Path, capsys: Capsys) -> None:
    lines = tried(small(digits_dir, **{"batch_size": -32, "optim.schedule": "linear"}), None, capsys)
    assert "batch_size=-32 must be at least 1" in line_of(lines, "FAIL", "config")
    assert "optim.schedule='linear' is not one of" in line_of(lines, "FAIL", "optimizer")
    line_of(lines, "ok", "model")


def test_classes_without_images_and_another_batch_size_are_warned_of(digits_dir: pathlib.Path, capsys: Capsys) -> None:
    changes = {"data.train_split": "train[:8]", "batch_size": 8, "data.virtual_shards": 1, "recipe_batch_size": 64}
    lines = tried(small(digits_dir, **changes), None, capsys, code=0)
    warning = line_of(lines, "warn", "dataset")
    assert re.search(r"\d classes of data.train_split have no image: ", warning)
    assert "batch_size=8, but this recipe was made for 64" in line_of(lines, "warn", "optimizer")


def test_a_checkpoint_of_another_model_is_refused_by_field(
    digits_dir: pathlib.Path, done: pathlib.Path, capsys: Capsys
) -> None:
    lines = tried(small(digits_dir, **{"model.width": 64}), done, capsys)
    failed = line_of(lines, "FAIL", "checkpoint")
    assert f"--workdir={done} was trained to step 8 with model.width=32 (now 64); give the old values, or" in failed


def test_a_checkpoint_that_does_not_fit_its_own_config_is_compared_by_path(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: Capsys
) -> None:
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["width"] = 64
    (workdir / "config.json").write_text(json.dumps(config))
    lines = tried(small(digits_dir, **{"model.width": 64}), workdir, capsys)
    failed = line_of(lines, "FAIL", "checkpoint")
    assert f"the checkpoint of step 8 in --workdir={workdir} is of another model or optimizer; use another" in failed
    differences = [line for line in lines if " saved, " in line]
    assert "  params/head/kernel: float32 (32, 10) saved, float32 (64, 10) in this model" in differences
    assert any(line.startswith("  ema/params/") for line in differences)
    assert any(line.startswith("  opt_state/") for line in differences)


def test_corrupt_metadata_are_skipped_or_fail_the_check(
    digits_dir: pathlib.Path, workdir: pathlib.Path, capsys: Capsys
) -> None:
    (workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("{")
    lines = tried(small(digits_dir), workdir, capsys, code=0)
    assert "that of step 4 fits" in line_of(lines, "ok", "checkpoint")
    assert "step 8: its metadata cannot be read" in line_of(lines, "warn", "checkpoint")
    (workdir / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{")
    lines = tried(small(digits_dir), workdir, capsys)
    failed = line_of(lines, "FAIL", "checkpoint")
    assert "none is good: step 8: its metadata cannot be read" in failed
    assert failed.endswith("start over with --restart_if_corrupt")


def test_a_workdir_that_cannot_be_used(
    digits_dir: pathlib.Path, tmp_path: pathlib.Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    lines = tried(small(digits_dir), file, capsys)
    assert f"--workdir={file} cannot be written to (File exists); name" in line_of(lines, "FAIL", "workdir")
    lines = tried(small(digits_dir), file / "run", capsys)
    failed = line_of(lines, "FAIL", "workdir")
    assert f"--workdir={file}/run cannot be created, because {file} is not a folder; name another one" in failed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with lock.acquire(tmp_path):
        lines = tried(small(digits_dir), tmp_path, capsys)
    failed = line_of(lines, "FAIL", "space")
    assert re.search(
        r"checkpoints need [\d,]+ bytes; 100 are free, 0 are used by them now; free some, name another", failed
    )
    failed = line_of(lines, "FAIL", "lock")
    assert f"is in use by process {os.getpid()} on " in failed
    assert failed.endswith("; wait for it, or name another one")
    assert lines[-1] == "FAIL: space, lock"
    line_of(lines, "ok", "workdir")


def test_without_a_device_the_cause_is_named(digits_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_use() -> None:
        raise RuntimeError("Unable to initialize backend 'tpu': The TPU is already in use by process 7\nmore")

    monkeypatch.setattr("jax.devices", in_use)
    with pytest.raises(ValueError, match=r"no device can be used \(Unable .* by process 7\); .* JAX_PLATFORMS=cpu$"):
        preflight.preflight(small(digits_dir), None)


def test_a_step_that_does_not_compile_for_lack_of_memory_names_what_to_lower(
    digits_dir: pathlib.Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(compiled: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm\nmore")

    class Step:
        lower = compile = lambda self, *inputs: self

    monkeypatch.setattr(preflight, "memory_of", exhausted)
    monkeypatch.setattr(preflight.build, "build_train_step", lambda *parts: Step())
    failed = line_of(tried(small(digits_dir), None, capsys, whole=True), "FAIL", "step")
    assert (
        "the step does not fit: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm; lower batch_size" in failed
    )


def test_a_step_that_does_not_fit_names_what_to_lower(
    digits_dir: pathlib.Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halvit_jax.cli.preflight._available_memory", lambda: (1000, "there"))
    lines = tried(small(digits_dir), None, capsys, whole=True)
    failed = line_of(lines, "FAIL", "step")
    assert failed.endswith(
        "MiB are there; lower batch_size, raise loop.accumulate or mesh.fsdp, or set model.remat=True"
    )


def test_every_image_of_a_small_set_is_decoded_and_all_bad_ones_listed(
    tmp_path: pathlib.Path, digits_dir: pathlib.Path, capsys: Capsys
) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                data.write_png(f"{tmp_path}/{split}/{name}/{number}.png", np.zeros((8, 8, 3), np.uint8))
    changes = {"data.name": "folder", "data.root": str(tmp_path), "data.eval_split": "val", "model.num_classes": 0}
    changes |= {"batch_size": 8, "data.virtual_shards": 1, "data.data_dir": ""}
    config = small(digits_dir, **changes)
    lines = tried(config, None, capsys, code=0)
    assert line_of(lines, "ok", "images").endswith("32 were decoded")
    assert "halvit_tiny" in line_of(lines, "ok", "model")  # with two classes, as the folder has
    for path in ("train/ant/3.png", "val/bee/5.png"):
        (tmp_path / path).write_text("<html>")
    lines = tried(config, None, capsys)
    assert "2 of 32 images cannot be decoded; remove them, or set data.on_bad_image" in line_of(lines, "FAIL", "images")
    for path in ("train/ant/3.png", "val/bee/5.png"):
        assert f"  {tmp_path}/{path}: by its first bytes it is no JPEG, PNG, GIF or BMP; it has 6 bytes" in lines
    config.data.on_bad_image = "replace"
    lines = tried(config, None, capsys, code=0)
    assert "2 of them cannot be and are replaced" in line_of(lines, "warn", "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "MAX_DECODED", 8)
        lines = tried(config, None, capsys, code=0)
    assert "0 were decoded; --all_images decodes all 32" in line_of(lines, "ok", "images")
