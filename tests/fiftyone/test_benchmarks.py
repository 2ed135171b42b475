"""Benchmarks as flat datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.images import load_mask


def test_concept_shapes(fo, make_dataset):
    dataset = make_dataset(12)
    samples = load_benchmark("concept-shapes", limit=12)
    targets = list(dataset.load_saved_view("targets"))
    assert [target["episode"] for target in targets] == [sample.sample_id for sample in samples]
    for target, sample in zip(targets, samples, strict=True):
        assert np.array_equal(np.asarray(Image.open(target.filepath)), np.asarray(sample.image))
        assert np.array_equal(load_mask(target["ground_truth"].mask_path), np.asarray(sample.mask) > 0)
        assert (target["prompt"], target["level"], target["group"]) == (
            sample.prompt,
            sample.level,
            sample.group,
        )
        assert target["present"] == sample.present
        references = (
            list(dataset.select(target["reference_ids"], ordered=True)) if target["reference_ids"] else []
        )
        for stored, reference in zip(references, sample.references, strict=True):
            assert np.array_equal(np.asarray(Image.open(stored.filepath)), np.asarray(reference.image))
            if reference.box is None:
                assert stored["ref_boxes"] is None
            else:
                [box] = stored["ref_boxes"].detections
                x, y, width, height = (reference.image.width * value for value in box.bounding_box)
                assert (x, y, x + width, y + height) == pytest.approx(reference.box)
    assert set(dataset.list_saved_views()) == {
        *("targets", "references", "episodes", "level CI", "level CD", "level CR"),
    }
    assert dataset.load_saved_view("episodes").media_type == "group"


def test_loading_again_adds_what_is_missing(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    dataset = make_dataset(4)
    before, seen = dataset.values("id"), []
    load_concept_benchmark(limit=6, dataset_name=dataset.name, progress=lambda *step: seen.append(step))
    dataset.reload()
    assert dataset.values("id")[: len(before)] == before
    assert len(dataset.load_saved_view("targets")) == 6
    assert seen == [(0, 6), (6, 6)]


@pytest.fixture()
def plain(tmp_path) -> Path:
    """A benchmark of files: two targets that share a reference with a mask, and one whose mask is damaged."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "r"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"{name}.jpg"
        )
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[5:20, 10:30] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "masks" / "c.png").write_bytes(b"no picture")
    shared = [{"image": "images/r.jpg", "mask": "masks/r.png"}]
    rows = [
        {"image": f"images/{name}.jpg", "mask": f"masks/{name}.png", "prompt": "thing", "references": shared}
        for name in "abc"
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_files_stay_where_they_are(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-files")
    try:
        first, second, third = dataset.load_saved_view("targets")
        [reference] = dataset.load_saved_view("references")  # once, though both use it
        assert first.filepath == str(plain / "images" / "a.jpg")
        assert first["reference_ids"] == second["reference_ids"] == [reference.id]
        assert reference.filepath == str(plain / "images" / "r.jpg")
        assert reference["ref_boxes"].detections[0].bounding_box == pytest.approx(
            [10 / 60, 5 / 40, 20 / 60, 15 / 40]
        )
        assert "damaged" in third["load_error"] and third["ground_truth"] is None
    finally:
        fo.delete_dataset("plain-files")


def test_what_cannot_be_read_is_shown_and_tried_again(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    picture, mask = plain / "images" / "b.jpg", plain / "masks" / "c.png"
    picture.rename(plain / "kept.jpg")
    try:
        with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
            dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        errors = dict(zip(*dataset.exists("load_error").values(["filepath", "load_error"])))
        assert errors.keys() == {str(picture), str(plain / "images" / "c.jpg")}
        assert str(picture) in errors[str(picture)]

        (plain / "kept.jpg").rename(picture)
        load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        assert dataset.exists("load_error").values("filepath") == [str(plain / "images" / "c.jpg")]
        Image.fromarray(np.zeros((40, 60), dtype=np.uint8)).save(mask)
        load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        assert dataset.count("load_error") == 0
        assert len(dataset.load_saved_view("targets").exists("ground_truth")) == 3
    finally:
        fo.delete_dataset("plain-broken")


def test_an_unknown_benchmark_is_named(fo):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    with pytest.raises(ValueError, match="no benchmark is named 'nothing'"):
        load_concept_benchmark("nothing")
    assert not fo.dataset_exists("nothing-test")
