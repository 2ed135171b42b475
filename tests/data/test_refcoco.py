"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of the REFER API."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.evaluation.reporting import coprs_tables
from conceptseg_hf.evaluation.reporting.aggregate import Row

pytest.importorskip("pycocotools")

SQUARE, FAR = [2, 3, 10, 3, 10, 9, 2, 9], [14, 2, 18, 2, 18, 6, 14, 6]


def ref(ref_id, image_id, split, *texts):
    return {
        "ref_id": ref_id,
        "ann_id": 100 + ref_id,
        "image_id": image_id,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image_id}_{ref_id}.jpg",
        "split": split,
        "sent_ids": [10 * ref_id + i for i in range(len(texts))],
        "sentences": [
            {"sent_id": 10 * ref_id + i, "sent": text, "raw": text.upper(), "tokens": text.split()}
            for i, text in enumerate(texts)
        ],
    }


def write(root, name, file, refs, segmentations):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps(refs, protocol=0))  # as written by Python 2
    images = root / "images/mscoco/images/train2014"
    images.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": []}
    for image_id in {item["image_id"] for item in refs}:
        name = f"COCO_train2014_{image_id}.jpg"
        Image.new("RGB", (20, 12)).save(images / name)
        content["images"].append({"id": image_id, "file_name": name, "width": 20, "height": 12})
    for item in refs:
        content["annotations"].append({"id": item["ann_id"], "segmentation": segmentations[item["ref_id"]]})
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    counts = np.zeros(20 * 12, dtype=int)
    counts[24:36] = 1  # the third column, in COCO's column order
    rle = {"size": [12, 20], "counts": [24, 12, 204]}
    refs = [
        ref(1, 7, "val", "left square", "the big one "),
        ref(2, 7, "testA", "both"),
        ref(3, 8, "train", "bar"),
    ]
    write(tmp_path, "refcoco", "refs(unc).p", refs, {1: [SQUARE], 2: [SQUARE, FAR], 3: rle})
    others = [ref(4, 8, "test", "bar again"), ref(5, 9, "train", "square")]
    write(tmp_path, "refcocog", "refs(umd).p", others, {4: rle, 5: [SQUARE]})
    return tmp_path


def test_each_expression_is_a_sample_with_the_mask_of_its_object(root) -> None:
    first, second = load_benchmark("refcoco", root, split="val")
    assert (first.prompt, second.prompt) == ("left square", "the big one")
    assert (first.sample_id, first.group, first.references) == ("1-10", "referring expressions", [])
    expected = np.zeros((12, 20), dtype=bool)
    expected[3:9, 2:10] = True
    assert np.array_equal(np.asarray(first.mask) > 0, expected)
    (both,) = load_benchmark("refcoco", root, split="testA")
    expected[2:6, 14:18] = True
    assert np.array_equal(np.asarray(both.mask) > 0, expected)


def test_run_length_codes_and_aliases(root) -> None:
    (sample,) = load_benchmark("refcocog", root, split="test")
    mask = np.asarray(sample.mask) > 0
    assert mask[:, 2].all() and mask.sum() == 12
    assert [item.prompt for item in load_benchmark("refcoco", root)] == ["left square", "the big one"]  # val


def test_training_leaves_out_images_of_other_splits(root) -> None:
    (sample,) = load_benchmark("refcocog", root, split="train")
    assert sample.prompt == "square"
    with pytest.raises(ValueError, match="no samples"):
        load_benchmark("refcoco", root, split="train")  # its only image is tested in RefCOCOg


class Dangerous:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_with_code_are_rejected_and_not_executed(root, capsys) -> None:
    path = root / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps([Dangerous()]))
    with pytest.raises(ValueError, match=r"it refers to .*print"):
        load_benchmark("refcoco", root, split="val")
    assert "executed" not in capsys.readouterr().out
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is not a file of expressions"):
        load_benchmark("refcoco", root, split="val")


def test_report_shows_the_tables_of_the_coprs_paper() -> None:
    def row(dataset, split, **values):
        return Row("data set", "CR", "", ((dataset, split),), 3, values, {}, 0.0)

    settings = {"protocol": "standard"}

    def markdown(*rows):
        return " ".join("\n".join(coprs_tables.sections(rows, settings)).split())

    text = "\n".join(coprs_tables.sections([row("refcoco", "testA", ciou=50.04)], settings))
    header, _, ours = [line for line in text.splitlines() if line.startswith("|")][:3]
    assert header.split("|")[3].strip() == "refcoco testA" and ours.split("|")[3].strip() == "50.0"
    text = markdown(row("refcoco", "testA", ciou=50.04))
    assert "| CoPRS-7B | 81.6 | 85.3 | 79.5 | 75.9 | 80.3 | 69.7 | 76.2 | 76.2 |" in text
    text = markdown(row("reasonseg", "val", giou=60.0, ciou=55.5))
    assert "| this run | 60.0 | 55.5 | - | - |" in text and "| CoPRS-3B | 61.3 | 60.6 | 57.8 | 52.7 |" in text
    assert coprs_tables.sections([row("DUTS", "test", ciou=1.0)], settings) == []
