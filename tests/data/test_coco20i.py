"""COCO-20i in the layout of the few-shot literature."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, save_image, save_json

from conceptseg_hf.data import MissingFilesError, load_benchmark

# Ids with gaps, as in COCO.
CATEGORIES = [
    {"id": category_id, "name": name} for category_id, name in ((1, "person"), (2, "bicycle"), (4, "bus"))
]


def write(root, split, names_by_image):
    """Write a split; `names_by_image` lists the classes in each image, from left to right, with 4 columns each."""
    labels_by_name = {"person": 1, "bicycle": 2, "bus": 3}
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, names in enumerate(names_by_image):
        file_name = f"COCO_{split}2014_{number:012d}.jpg"
        save_image(root / f"{split}2014" / file_name, seed=number)
        labels = np.zeros(SIZE[::-1], dtype=np.uint8)
        for column, name in enumerate(names):
            labels[:, 4 * column : 4 * column + 4] = labels_by_name[name]
            content["annotations"].append(
                {"image_id": number, "category_id": ids[name], "id": len(content["annotations"])}
            )
        path = (root / "annotations" / f"{split}2014" / file_name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
        content["images"].append({"id": number, "file_name": file_name, "width": SIZE[0], "height": SIZE[1]})
    save_json(root / "annotations" / f"instances_{split}2014.json", content)


@pytest.fixture()
def root(tmp_path):
    write(tmp_path / "COCO2014", "train", [("person", "bus")] * 5 + [("bicycle",)] * 2)
    write(tmp_path / "COCO2014", "val", [("person", "bus"), ("bicycle",), ()])
    return tmp_path


def test_one_sample_per_image_and_class(root):
    samples = load_benchmark("coco20i", root)
    assert samples.split == "val" and [sample.prompt for sample in samples] == ["person", "bus", "bicycle"]
    assert samples[1].box == (4, 0, 8, SIZE[1]) and samples[1].ignore is None
    assert [len(sample.references) for sample in samples] == [4, 4, 1]
    assert all(reference.box == (4, 0, 8, SIZE[1]) for reference in samples[1].references)
    assert len(load_benchmark("coco20i", root / "COCO2014")) == 3


def test_folds_contain_every_fourth_class(root):
    assert [sample.prompt for sample in load_benchmark("coco20i-0", root)] == ["person"]
    assert [sample.prompt for sample in load_benchmark("coco20i-1", root)] == ["bicycle"]
    with pytest.raises(
        ValueError, match=r"'coco20i-3' has no samples in split 'val' below '.*'; give another split"
    ):
        load_benchmark("coco20i-3", root)


def test_training_target_is_not_its_own_reference(root):
    samples = load_benchmark("coco20i", root, split="train")
    for sample, item in zip(samples, samples.items, strict=True):
        drawn = [reference.image.tobytes() for reference in sample.references]
        assert sample.image.tobytes() not in drawn and len(drawn) == (1 if item.concept == "bicycle" else 4)


def test_missing_and_malformed_files(root):
    (root / "COCO2014/annotations/val2014/COCO_val2014_000000000001.png").unlink()
    with pytest.raises(
        MissingFilesError, match=r"\(1 mask\): 'annotations/val2014|COCO2014/annotations/val2014"
    ):
        load_benchmark("coco20i", root)
    path = root / "COCO2014/annotations/instances_val2014.json"
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="is not a COCO instances file"):
        load_benchmark("coco20i", root)
    path.unlink()
    with pytest.raises(MissingFilesError, match=r"instances_val2014\.json"):
        load_benchmark("coco20i", root)
