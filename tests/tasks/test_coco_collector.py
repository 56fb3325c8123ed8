import json
import pathlib
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_coco

from halvit_jax.config import default_config
from halvit_jax.data import scenes
from halvit_jax.data.instance_loaders import make_detection_loaders
from halvit_jax.detection import coco_metric
from halvit_jax.tasks.coco_collector import CocoCollector, gather_bytes

SIZES = Counter(b=4, d=6)
CATEGORY_IDS = (3, 7, 90)


def _truth() -> dict[str, Any]:
    content = small_coco.content(6)
    content["annotations"] = [
        small_coco.box(100 + n, [4, 5, 20, 10 + 4 * n], category=CATEGORY_IDS[n % 3]) | {"id": n + 1} for n in range(6)
    ]
    return content


def _perfect(truth: dict[str, Any], scale: float = 1.5) -> list[tuple[dict, dict]]:
    """Batches of 4 images in which each object is found, on a canvas that is larger than the files."""
    batches = []
    images = truth["images"]
    for first in range(0, len(images), SIZES["b"]):
        own = images[first : first + SIZES["b"]]
        b, d = SIZES["b"], SIZES["d"]
        scored = {"boxes": np.zeros((b, d, 4), np.float32), "scores": np.zeros((b, d), np.float32)}
        scored |= {"labels": np.zeros((b, d), np.int32), "valid": np.zeros((b, d), bool)}
        scored["masks"] = np.zeros((b, d, 28, 28), np.float32)
        batch = {"size": np.zeros((b, 2), np.int32), "original": np.zeros((b, 2), np.int32)}
        batch |= {"image_id": np.zeros(b, np.int32), "mask": np.arange(b) < len(own)}
        for row, image in enumerate(own):
            original = np.array([image["height"], image["width"]])
            batch["size"][row], batch["original"][row] = original * scale, original
            batch["image_id"][row] = image["id"]
            for n, entry in enumerate(e for e in truth["annotations"] if e["image_id"] == image["id"]):
                x, y, w, h = entry["bbox"]
                scored["boxes"][row, n] = np.array([x, y, x + w, y + h]) * scale
                scored["labels"][row, n] = CATEGORY_IDS.index(entry["category_id"])
                scored["scores"][row, n], scored["valid"][row, n] = 0.9, True
                scored["masks"][row, n] = 1
        batches.append((scored, batch))
    return batches


def _collect(collector: CocoCollector, batches: list[tuple[dict, dict]]) -> dict[str, float | None]:
    for scored, batch in batches:
        collector.add(scored, batch)
    return collector.result()


def test_detections_are_scored_in_pixels_of_the_file(tmp_path: pathlib.Path) -> None:
    truth = _truth()
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    collector = CocoCollector(str(path), CATEGORY_IDS, masks=True)
    metrics = _collect(collector, _perfect(truth))
    for name in ("box_ap", "mask_ap", "box_ar100", "mask_ap/cat", "box_ap_small"):
        assert metrics[name] == pytest.approx(1.0), name
    assert metrics["box_ap_large"] is None
    assert len(collector.detections) == 6
    first = json.loads(json.dumps(collector.detections))[0]
    assert first["image_id"] == 100
    assert first["category_id"] == 3
    assert first["bbox"] == pytest.approx([4, 5, 20, 10])
    assert first["segmentation"]["size"] == [40, 60]
    again = coco_metric.evaluate(truth, collector.detections, kind="mask")
    assert again["ap"] == pytest.approx(1.0)


def test_without_masks_only_boxes_are_scored() -> None:
    truth = _truth()
    collector = CocoCollector(truth, CATEGORY_IDS, masks=False)
    metrics = _collect(collector, [({k: v for k, v in s.items() if k != "masks"}, b) for s, b in _perfect(truth)])
    assert metrics["box_ap"] == pytest.approx(1.0)
    assert not any(name.startswith("mask") for name in metrics)
    assert "segmentation" not in collector.detections[0]


def test_rows_that_fill_a_batch_and_detections_that_are_not_valid_are_no_detections() -> None:
    truth = _truth()
    batches = _perfect(truth)
    for scored, batch in batches:
        scored["valid"] |= ~batch["mask"][:, None]
    batches[0][0]["valid"][2] = False
    collector = CocoCollector(truth, CATEGORY_IDS, masks=True)
    assert _collect(collector, batches)["box_ap"] < 1
    assert [found["image_id"] for found in collector.detections] == [100, 101, 103, 104, 105]


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_draw_their_own_rows_and_agree(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = _truth()
    batches = _perfect(truth)
    alone = CocoCollector(truth, CATEGORY_IDS, masks=True)
    expected = _collect(alone, batches)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    sent: list[bytes] = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        collector = CocoCollector(truth, CATEGORY_IDS, masks=True, gather=lambda own: sent.append(own) or sent[:1])
        for scored, batch in batches:
            collector.add(scored, batch)
        sent_before = len(sent)
        collector.result()
        del sent[sent_before + 1 :]  # the metrics of this host, which are of its part alone
    assert all(json.loads(part) for part in sent)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    answers = iter([sent, None])
    whole = CocoCollector(truth, CATEGORY_IDS, masks=True, gather=lambda own: next(answers) or [own])
    assert whole.result() == expected
    key = json.dumps
    assert sorted(map(key, whole.detections)) == sorted(map(key, alone.detections))


def test_the_bytes_of_one_process_are_those_of_all() -> None:
    assert gather_bytes(b"abc") == [b"abc"]


def test_bytes_of_different_lengths_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import multihost_utils

    def gather(array: np.ndarray) -> np.ndarray:
        other = np.array([5]) if array.dtype == np.int64 else np.frombuffer(b"12345", np.uint8)
        return np.stack([array, other])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert gather_bytes(b"abc") == [b"abc", b"12345"]


def test_a_backend_that_is_unknown_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"detection.metric_backend='coco' is not one of pycocotools"):
        CocoCollector(_truth(), CATEGORY_IDS, masks=True, backend="coco")


def _ceiling(data_dir: str, short_side: int = 0, long_side: int = 0) -> dict[str, float | None]:
    """The metrics of ground truth fed back as detections, its masks through 28 x 28 probabilities."""
    from halvit_jax.detection.targets import mask_targets

    canvas = max(192, long_side)
    fields = {"name": "digits_scenes", "data_dir": data_dir, "canvases": ((canvas, canvas),)}
    fields |= {"short_side": short_side, "long_side": long_side, "max_objects": 8}
    loaders = make_detection_loaders(**default_config().instances.to_dict() | fields, batch_size=2, seed=0)
    collector = CocoCollector(loaders.info.extra["eval_annotations"], loaders.info.extra["category_ids"], masks=True)
    targets = jax.jit(jax.vmap(mask_targets))
    for batch in loaders.evals["eval"].batches():
        masks = np.asarray(targets(batch["crops"], batch["boxes"], batch["boxes"]), np.float32)
        scores = np.ones(batch["label"].shape, np.float32)
        found = {"boxes": batch["boxes"], "scores": scores, "labels": batch["label"], "valid": batch["real"]}
        collector.add({**found, "masks": masks}, batch)
    return collector.result()


def test_ground_truth_fed_back_scores_one_for_boxes_and_its_ceiling_for_masks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "SPLITS", {"train": (1, 4), "val": (2, 6)})
    found = _ceiling(str(tmp_path))
    assert found["box_ap"] == pytest.approx(1.0)
    assert 0.85 < found["mask_ap"] < 1


@pytest.mark.slow  # it draws all 1,200 images
def test_the_ceiling_of_masks_of_28_x_28_on_all_scenes(tmp_path: pathlib.Path) -> None:
    for sides in ((0, 0), (256, 256)):
        found = _ceiling(str(tmp_path), *sides)
        assert found["box_ap"] == pytest.approx(1.0)
        assert found["mask_ap"] > 0.9
