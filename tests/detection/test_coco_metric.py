import copy
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from helpers.gcs_server import Server

from halvit_jax.detection import coco_metric
from halvit_jax.detection.coco_metric import encode_masks, evaluate, read_truth

OURS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP_small", "ap_medium": "AP_medium"}
OURS |= {"ap_large": "AP_large", "ar100": "AR_100"}


@pytest.fixture(scope="module")
def case(golden: pathlib.Path) -> dict[str, Any]:
    return json.loads((golden / "detection/coco_eval.json").read_text())


@pytest.fixture(scope="module")
def truth(case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("truth") / "instances.json"
    path.write_text(json.dumps(case["ground_truth"]))
    return read_truth(str(path))


@pytest.mark.parametrize(("kind", "name"), coco_metric.KINDS.items())
def test_metrics_are_those_of_the_golden_evaluation(case: dict, truth: dict, kind: str, name: str) -> None:
    found = evaluate(truth, case["detections"], kind=kind)
    expected = dict(zip(case["names"], case["results"][name], strict=True))
    assert {ours: found[ours] for ours in OURS} == pytest.approx({o: expected[t] for o, t in OURS.items()}, abs=1e-6)
    names = {str(category["id"]): category["name"] for category in case["ground_truth"]["categories"]}
    by_category = {f"ap/{names[n]}": value for n, value in case["results"][f"{name}_by_category"].items()}
    assert {n: value for n, value in found.items() if "/" in n} == pytest.approx(by_category, abs=1e-6)


def test_all_images_count_also_those_without_detections(case: dict, truth: dict) -> None:
    whole = evaluate(truth, case["detections"], kind="box")["ap"]
    image = case["detections"][0]["image_id"]
    fewer = [detection for detection in case["detections"] if detection["image_id"] != image]
    assert evaluate(truth, fewer, kind="box")["ap"] < whole


@pytest.mark.parametrize("kind", coco_metric.KINDS)
def test_ground_truth_as_detections_scores_one(truth: dict, kind: str) -> None:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    perfect = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "score": 1.0,
            "segmentation": encode_masks(coco.annToMask(entry)[None])[0],
        }
        for entry in coco.dataset["annotations"]
        if not entry["iscrowd"]
    ]
    found = evaluate(truth, perfect, kind=kind)
    assert found["ap"] == pytest.approx(1.0)
    assert found["ar100"] == pytest.approx(1.0)


def _truth(*annotations: dict[str, Any]) -> dict[str, Any]:
    images = [{"id": 5, "height": 100, "width": 100}, {"id": 6, "height": 100, "width": 100}]
    return {
        "images": images,
        "annotations": list(annotations),
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }


def _file(path: pathlib.Path, *annotations: dict[str, Any]) -> str:
    path.write_text(json.dumps(_truth(*annotations)))
    return str(path)


BOX = {"id": 0, "image_id": 5, "category_id": 3, "bbox": [10, 10, 20, 20]}
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
FOUND = {"image_id": 5, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.5}


def test_the_ground_truth_in_a_bucket_is_that_on_a_disk(tmp_path: pathlib.Path, server: Server) -> None:
    file = pathlib.Path(_file(tmp_path / "truth.json", BOX))
    server.bucket.put("coco/truth.json", file.read_bytes())
    assert read_truth(f"{server.url}/coco/truth.json") == read_truth(str(file))


def test_an_annotation_of_number_zero_and_without_area_can_be_found(tmp_path: pathlib.Path) -> None:
    truth = read_truth(_file(tmp_path / "truth.json", BOX))
    assert truth["annotations"] == [{**BOX, "id": 1, "iscrowd": 0, "area": 400}]
    found = evaluate(truth, [FOUND], kind="box")
    assert {name: value and round(value, 9) for name, value in found.items()} == {
        **{"ap": 1.0, "ap50": 1.0, "ap75": 1.0, "ap_small": 1.0, "ar100": 1.0, "ap/cat": 1.0},
        **{"ap_medium": None, "ap_large": None, "ap/dog": None},  # of these there are none
    }


def test_without_detections_or_ground_truth_metrics_are_zero_or_undefined(tmp_path: pathlib.Path) -> None:
    truth = read_truth(_file(tmp_path / "truth.json", BOX))
    assert evaluate(truth, [], kind="box")["ap"] == 0.0
    assert set(evaluate(truth, [], kind="mask").values()) == {None}  # no mask
    assert set(evaluate(read_truth(_file(tmp_path / "no.json")), [FOUND], kind="box").values()) == {None}


def test_polygons_of_two_points_are_no_boxes(tmp_path: pathlib.Path) -> None:
    """pycocotools takes four numbers for x, y, width and height."""
    both, none = {**BOX, "segmentation": [[1, 1, 9, 9], SQUARE]}, {**BOX, "id": 2, "segmentation": [[1, 1, 9, 9]]}
    truth = read_truth(_file(tmp_path / "truth.json", both, none))
    assert truth["annotations"][0]["segmentation"] == [SQUARE]
    assert "segmentation" not in truth["annotations"][1]
    mask = np.zeros((1, 100, 100), bool)
    mask[:, 10:30, 10:30] = True
    detection = {**FOUND, "segmentation": encode_masks(mask)[0]}
    assert evaluate(truth, [detection], kind="mask")["ap"] == pytest.approx(1.0)


def test_areas_of_detections_are_those_of_their_masks_where_they_have_no_box(tmp_path: pathlib.Path) -> None:
    """A false detection counts for the sizes that its area has."""
    truth = read_truth(_file(tmp_path / "truth.json", {**BOX, "segmentation": [SQUARE]}))
    large, small = np.zeros((1, 100, 100), bool), np.zeros((1, 100, 100), bool)
    large[:, 60:, 60:], small[:, 10:30, 10:30] = True, True
    wrong = {**FOUND, "bbox": [60, 60, 10, 10], "score": 0.9, "segmentation": encode_masks(large)[0]}
    both = [wrong, {**FOUND, "segmentation": encode_masks(small)[0]}]
    assert evaluate(truth, both, kind="mask")["ap_small"] == pytest.approx(0.5, abs=0.01)
    for detection in both:
        del detection["bbox"]
    assert evaluate(truth, both, kind="mask")["ap_small"] == pytest.approx(1.0)


def test_ids_that_the_ground_truth_does_not_have_are_refused() -> None:
    for field, number in {"image_id": 77, "category_id": 4}.items():
        with pytest.raises(ValueError, match=f"a {field} that the ground truth does not have: {number}"):
            evaluate(_truth(), [{**FOUND, field: number}], kind="box")


def test_a_backend_that_is_unknown_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"detection.metric_backend='coco' is not one of pycocotools, faster_coco_eval"
    ):
        evaluate(_truth(), [], kind="box", backend="coco")
    for name, module in {"pycocotools": "pycocotools.coco", "faster_coco_eval": "faster_coco_eval"}.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"detection.metric_backend='{name}' is not installed: pip install"):
            coco_metric.check_backend(name)


def test_masks_are_encoded_as_text() -> None:
    from pycocotools import mask

    masks = np.random.default_rng(0).random((3, 7, 9)) < 0.5
    encoded = json.loads(json.dumps(encode_masks(masks)))
    for rle, one in zip(encoded, masks, strict=True):
        np.testing.assert_array_equal(mask.decode(rle), one)
