"""Tests of importing benchmarks as flat datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.images import load_image, load_mask


def test_concept_shapes_samples_match_the_benchmark(fo, make_dataset):
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
    before, reports = dataset.values("id"), []
    load_concept_benchmark(limit=6, dataset_name=dataset.name, progress=lambda *step: reports.append(step))
    dataset.reload()
    assert dataset.values("id")[: len(before)] == before
    assert len(dataset.load_saved_view("targets")) == 6
    assert reports == [(0, 6), (6, 6)]


@pytest.fixture()
def plain(tmp_path) -> Path:
    """Benchmark in files: two targets that share a reference with a mask, and a target with a damaged mask."""
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
    (tmp_path / "masks" / "c.png").write_bytes(b"not an image")
    shared = [{"image": "images/r.jpg", "mask": "masks/r.png"}]
    rows = [
        {"image": f"images/{name}.jpg", "mask": f"masks/{name}.png", "prompt": "thing", "references": shared}
        for name in "abc"
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_image_files_are_referenced_in_place_and_shared_references_stored_once(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-files")
    try:
        first, second, third = dataset.load_saved_view("targets")
        [reference] = dataset.load_saved_view("references")  # stored once, although both targets use it
        assert first.filepath == str(plain / "images" / "a.jpg")
        assert first["reference_ids"] == second["reference_ids"] == [reference.id]
        assert reference.filepath == str(plain / "images" / "r.jpg")
        assert reference["ref_boxes"].detections[0].bounding_box == pytest.approx(
            [10 / 60, 5 / 40, 20 / 60, 15 / 40]
        )
        assert "damaged" in third["load_error"] and third["ground_truth"] is None
    finally:
        fo.delete_dataset("plain-files")


def test_targets_share_a_reference_only_if_its_mark_is_equal(fo, plain, monkeypatch):
    from conceptseg_hf.integrations.fiftyone import benchmarks, load_concept_benchmark

    def save_mask(name, columns):
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[5:20, columns] = 255
        Image.fromarray(mask).save(plain / "masks" / f"{name}.png")

    marks = {"left": slice(0, 10), "right": slice(40, 60), "copy": slice(0, 10)}
    for name, columns in marks.items():
        save_mask(name, columns)
    marks = [{"mask": f"masks/{name}.png"} for name in marks]
    marks += [marks[0], {"box": [0, 0, 30, 20]}, {"box": [30, 0, 60, 20]}, {"box": [0, 0, 30, 20]}, {}, {}]
    image = {"image": "images/a.jpg", "mask": "masks/a.png", "prompt": "thing"}
    rows = [
        image | {"id": str(number), "references": {"image": "images/r.jpg"} | mark}
        for number, mark in enumerate(marks)
    ]
    (plain / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    monkeypatch.setattr(benchmarks, "load_image", lambda image: read.append(image) or load_image(image))
    try:
        load_concept_benchmark("plain", root=plain, dataset_name="plain-marks", limit=5)
        assert len(read) == 3 + 1  # each mask file and box is read once
        monkeypatch.chdir(plain.parent)
        dataset = load_concept_benchmark("plain", root=plain.name, dataset_name="plain-marks")
        [ids] = zip(*dataset.load_saved_view("targets").values("reference_ids"))
        left, right, copy, again, box, other_box, same_box, bare, bare_again = ids
        assert left == copy == again and box == same_box and bare == bare_again
        assert len({left, right, box, other_box, bare}) == 5 == len(dataset.load_saved_view("references"))
        assert load_mask(dataset[right]["ground_truth"].mask_path)[:, 40:].any()
        assert not load_mask(dataset[left]["ground_truth"].mask_path)[:, 40:].any()
        assert dataset[other_box]["ref_boxes"].detections[0].bounding_box == pytest.approx([0.5, 0, 0.5, 0.5])
        assert dataset[bare]["ref_boxes"] is None and dataset[bare]["ground_truth"] is None
    finally:
        fo.delete_dataset("plain-marks")


def test_a_dataset_rejects_the_same_benchmark_from_another_folder(fo, plain, tmp_path_factory):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    other = tmp_path_factory.mktemp("other") / "project"
    shutil.copytree(plain, other)
    try:
        dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-roots")
        ids = dataset.values("id")
        with pytest.raises(ValueError) as refused:
            load_concept_benchmark("plain", root=other, dataset_name="plain-roots")
        assert all(part in str(refused.value) for part in (str(plain), str(other), "another dataset_name"))
        load_concept_benchmark("plain", root=str(plain / "images" / ".."), dataset_name="plain-roots")
        assert dataset.values("id")[:-1] == ids[:-1]  # the last one has a load_error and was retried
        load_concept_benchmark(limit=1, dataset_name="plain-roots")  # another benchmark
        assert set(dataset.distinct("benchmark")) == {"plain", "concept-shapes"}
    finally:
        fo.delete_dataset("plain-roots")


def test_a_user_dataset_with_a_benchmark_field_is_rejected(fo):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    other = fo.Dataset("someones")
    try:
        load_concept_benchmark(limit=1, dataset_name="someones")  # a dataset without samples is accepted
        other.clear()
        other.info = {}
        other.save()
        other.add_sample(fo.Sample(filepath="nothing.png", benchmark="mine"))
        with pytest.raises(ValueError, match="'someones' already exists and holds other samples"):
            load_concept_benchmark(limit=1, dataset_name="someones")
        assert len(other) == 1
    finally:
        fo.delete_dataset("someones")


def test_edited_views_are_kept_and_new_levels_get_a_view(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    def load():
        return load_concept_benchmark("plain", root=plain, dataset_name="plain-views")

    try:
        dataset = load()
        dataset.save_view("targets", dataset.limit(1), overwrite=True)
        dataset.delete_saved_view("episodes")
        dataset.save_view("Episodes", dataset.limit(2))  # FiftyOne treats both names as equal
        rows = [json.loads(line) for line in (plain / "samples.jsonl").read_text().splitlines()]
        rows.append(rows[0] | {"id": "new", "level": "late"})
        (plain / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        views = set(load().list_saved_views())
        assert len(dataset.load_saved_view("targets")) == 1
        assert len(dataset.load_saved_view("Episodes")) == 2 and "episodes" not in views
        assert dataset.load_saved_view("level late").values("episode") == ["new"]
    finally:
        fo.delete_dataset("plain-views")


def test_unreadable_samples_have_load_error_and_are_retried(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    image, mask = plain / "images" / "b.jpg", plain / "masks" / "c.png"
    image.rename(plain / "kept.jpg")
    try:
        with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
            dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        errors = dict(zip(*dataset.exists("load_error").values(["filepath", "load_error"])))
        assert errors.keys() == {str(image), str(plain / "images" / "c.jpg")}
        assert str(image) in errors[str(image)]

        (plain / "kept.jpg").rename(image)
        load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        assert dataset.exists("load_error").values("filepath") == [str(plain / "images" / "c.jpg")]
        Image.fromarray(np.zeros((40, 60), dtype=np.uint8)).save(mask)
        load_concept_benchmark("plain", root=plain, dataset_name="plain-broken")
        assert dataset.count("load_error") == 0
        assert len(dataset.load_saved_view("targets").exists("ground_truth")) == 3
    finally:
        fo.delete_dataset("plain-broken")


def test_unknown_benchmark_raises(fo):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    with pytest.raises(ValueError, match="no benchmark is named 'nothing'"):
        load_concept_benchmark("nothing")
    assert not fo.dataset_exists("nothing-test")


@pytest.mark.parametrize(("params", "limit"), [({}, 60), ({"limit": None}, None), ({"limit": 3}, 3)])
def test_the_operator_has_the_default_limit_of_its_form(fo, run_operator, monkeypatch, params, limit):
    from conceptseg_hf.integrations.fiftyone import benchmarks

    limits = []
    monkeypatch.setattr(benchmarks, "import_benchmark", lambda *given: limits.append(given[3]) or iter(()))
    run_operator("load_concept_benchmark", None, params)
    assert limits == [limit]


def test_a_target_is_loaded_without_its_damaged_reference(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    (plain / "images" / "broken.jpg").write_bytes(b"not an image")
    lines = (plain / "samples.jsonl").read_text().splitlines()
    (plain / "samples.jsonl").write_text(
        "\n".join([lines[0].replace("images/r.jpg", "images/broken.jpg"), lines[1]])
    )
    with pytest.warns(
        UserWarning, match=r"sample 'images/a' has 1 fewer: image '.*broken\.jpg' cannot be read"
    ):
        dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-reference")
    try:
        first, second = dataset.load_saved_view("targets")
        assert first["load_error"] is None and first["ground_truth"] is not None
        assert first["reference_ids"] == [] and len(second["reference_ids"]) == 1
    finally:
        fo.delete_dataset("plain-reference")


def test_a_mask_without_its_image_does_not_stop_the_load(fo, plain):
    """FiftyOne does not recognize a file without an image extension and rejects it in an image dataset."""
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    (plain / "samples.jsonl").unlink()
    (plain / "prompt.txt").write_text("thing")
    (plain / "images" / "b.jpg").unlink()
    Image.open(plain / "images" / "a.jpg").save(plain / "images" / "r.gif")
    (plain / "images" / "r.jpg").unlink()
    try:
        with pytest.warns(UserWarning, match="of 4 samples lack files"):
            dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-photo")
        assert set(dataset.values("episode")) == {"a", "b", "c", "r"}
        lost = dataset.match({"episode": "b"}).first()
        assert lost.filepath == str(plain / "images" / "b.png") and "is not a file" in lost["load_error"]
        assert lost["ground_truth"] is None
        assert dataset.match({"episode": "a"}).first()["load_error"] is None
    finally:
        fo.delete_dataset("plain-photo")


def test_images_with_unknown_extensions_are_copied_as_png(fo, plain):
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    for name in "ar":
        Image.open(plain / "images" / f"{name}.jpg").save(plain / "images" / f"{name}.tga")
    rows = (plain / "samples.jsonl").read_text().splitlines()
    (plain / "samples.jsonl").write_text(rows[0].replace(".jpg", ".tga") + "\n" + rows[1])
    try:
        for _ in range(2):  # the second load finds the copies of the first one
            dataset = load_concept_benchmark("plain", root=plain, dataset_name="plain-tga")
            copied, kept = dataset.load_saved_view("targets")
            assert kept.filepath == str(plain / "images" / "b.jpg")
            [reference] = dataset.select(copied["reference_ids"])
            for sample, name in ((copied, "a"), (reference, "r")):
                assert sample.filepath.endswith(".png") and str(plain) not in sample.filepath
                assert np.array_equal(
                    load_image(sample.filepath), load_image(plain / "images" / f"{name}.tga")
                )
            assert len(dataset) == 4 and dataset.count("load_error") == 0
    finally:
        fo.delete_dataset("plain-tga")
