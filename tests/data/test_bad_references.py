"""Unusable references are replaced by others of their class, and reported."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from test_cityscapes import CAR, ROAD, label_map
from test_cityscapes import write as write_street
from test_coco20i import write as write_coco
from trees import SIZE, save_image, save_json, save_mask

from conceptseg_hf import Reference
from conceptseg_hf.cli import main
from conceptseg_hf.data import UnreadableSampleError, check_benchmark, load_benchmark
from conceptseg_hf.data.files import ClassPool
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.references import resolve_references

SHORT = {"max_new_tokens": 4}
BAD = "fewshot1000/train/{}/5.{}"


def resize_mask(root):
    save_mask(root / BAD.format("mask", "png"), size=(30, 30))


def photo_of_different_size(root):
    save_image(root / BAD.format("mask", "png"), size=(30, 30))


def photo_of_the_same_size(root):
    save_image(root / BAD.format("mask", "png"))


def empty_mask(root):
    save_mask(root / BAD.format("mask", "png"), box=(0, 0, 0, 0))


def broken_mask(root):
    (root / BAD.format("mask", "png")).write_bytes(b"not an image")


def truncated_image(root):
    path = save_image(root / BAD.format("image", "jpg"), size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    resize_mask: "mask '.*5.png' has 30 x 30 pixels, but its image has 24 x 16",
    photo_of_different_size: "mask '.*5.png' is a photo, not a mask",
    photo_of_the_same_size: "mask '.*5.png' is a photo, not a mask",
    empty_mask: "mask '.*5.png' has no foreground pixel",
    broken_mask: "mask '.*5.png' cannot be read",
    truncated_image: "image '.*5.jpg' cannot be read",
}


@pytest.fixture()
def fss_root(authors_tree):
    """A class of FSS-1000 with 16 images."""

    def make(size=16):
        for number in range(size):
            authors_tree.add("train", "fewshot1000", "ab_wheel", str(number))
        return authors_tree.write()

    return make


def names(references):
    return [reference.image.name for reference in references]


def read_all(samples):
    """Read all samples; those that cannot be read are None."""
    loaded = []
    for index in range(len(samples)):
        try:
            loaded.append(samples[index])
        except UnreadableSampleError:
            loaded.append(None)
    return loaded


@pytest.mark.parametrize(
    ("damage", "message"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_unusable_reference_is_replaced_by_another_one_of_its_class(fss_root, damage, message):
    root = fss_root()
    healthy = [names(sample.references) for sample in load_benchmark("fewshot1000", root, split="train")]
    assert sum("5.jpg" in drawn for drawn in healthy) == 3
    damage(root)
    samples = load_benchmark("fewshot1000", root, split="train")
    with pytest.warns(UserWarning, match=message) as warned:
        loaded = read_all(samples)
    assert len(warned) == 1, "an unusable reference is reported once"
    # The empty mask of a target means that the concept is absent; all other faults make the sample unreadable.
    assert [sample is None for sample in loaded] == [
        index == 5 and damage is not empty_mask for index in range(16)
    ]
    for sample, before in zip(loaded, healthy, strict=True):
        if sample is None:
            continue
        after = names(sample.references)
        assert len(set(after)) == 4 and "5.jpg" not in after and sample.references_lost == 0
        assert [(index, name) for index, name in enumerate(before) if name != "5.jpg"] == [
            (index, after[index]) for index, name in enumerate(before) if name != "5.jpg"
        ], "the other references do not change"
        assert len(sample.reference_faults) == ("5.jpg" in before)
        assert resolve_references(sample.references).boxes == ((4, 2, 12, 10),) * 4


def test_replacements_depend_only_on_seed_and_sample(fss_root):
    root = fss_root()
    empty_mask(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = [names(sample.references) for sample in load_benchmark("fewshot1000", root, split="train")]
        backwards = load_benchmark("fewshot1000", root, split="train")
        assert [names(backwards[index].references) for index in reversed(range(16))] == first[::-1]
        copied = pickle.loads(pickle.dumps(backwards))
        assert [names(sample.references) for sample in copied] == first
        other = [names(s.references) for s in load_benchmark("fewshot1000", root, split="train", seed=7)]
    assert other != first
    all_names = {name for drawn in first for name in drawn}
    assert len(all_names) > 10 and "5.jpg" not in all_names


def test_spares_are_drawn_only_if_needed(fss_root, monkeypatch):
    samples = load_benchmark("fewshot1000", fss_root(), split="train")
    calls = []
    original = ClassPool.spares
    monkeypatch.setattr(ClassPool, "spares", lambda *arguments: calls.append(1) or original(*arguments))
    list(samples)
    assert not calls


def test_class_without_spares_gives_fewer_references(fss_root):
    root = fss_root(size=4)
    for number in (1, 2):
        save_mask(root / f"fewshot1000/train/mask/{number}.png", box=(0, 0, 0, 0))
    with pytest.warns(UserWarning, match="no replacement is available, so sample .* has") as warned:
        samples = read_all(load_benchmark("fewshot1000", root, split="train"))
    used = [set(names(sample.references)) for sample in samples]
    assert used == [{"3.jpg"}, {"0.jpg", "3.jpg"}, {"0.jpg", "3.jpg"}, {"0.jpg"}]
    assert [sample.references_lost for sample in samples] == [2, 1, 1, 2]
    assert sorted("1.png" in str(warning.message) for warning in warned) == [False, True], (
        "each is reported once"
    )


def test_listed_references_are_dropped_individually(tmp_path):
    for stem in ("a", "b", "c"):
        save_image(tmp_path / f"images/{stem}.jpg", seed=ord(stem))
        save_mask(tmp_path / f"masks/{stem}.png")
    (tmp_path / "images/broken.jpg").write_bytes(b"not an image")
    references = [
        "images/broken.jpg",
        "images/missing.jpg",
        {"image": "images/b.jpg", "box": [50, 0, 60, 9]},
        {"image": "images/c.jpg", "mask": "masks/missing.png"},
        {"image": "images/c.jpg", "mask": "masks/c.png"},
    ]
    row = {"image": "images/a.jpg", "mask": "masks/a.png", "prompt": "scratch", "references": references}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match="sample 'images/a' has 4 fewer") as warned:
        (sample,) = load_benchmark("plain", tmp_path)
    assert names(sample.references) == ["c.jpg"] and sample.references_lost == 4
    for fault, name in zip(sample.reference_faults, ("broken.jpg", "missing.jpg", "b.jpg", "missing.png")):
        assert name in fault
    assert "lies outside its image of 24 x 16 pixels" in sample.reference_faults[2] and len(warned) == 4
    (check,) = check_benchmark("plain", tmp_path)
    assert len(check.missing) == 2 and len(check.inspection.unusable_references) == 2 and not check.complete


def test_coco_references_are_replaced(tmp_path):
    root = tmp_path / "COCO2014"
    write_coco(root, "train", [("person", "bus")] * 9)
    write_coco(root, "val", [("person", "bus")] * 4)
    healthy = load_benchmark("coco20i", tmp_path)
    drawn = [[reference.image.name for reference in healthy.references_of(item)] for item in healthy.items]
    hidden, broken = "COCO_train2014_000000000003", "COCO_train2014_000000000007"
    assert any(hidden in name for names_of_sample in drawn for name in names_of_sample)
    labels = np.full(SIZE[::-1], 3, dtype=np.uint8)  # the bus hides the person
    Image.fromarray(labels).save(root / f"annotations/train2014/{hidden}.png")
    (root / f"annotations/train2014/{broken}.png").write_bytes(b"not an image")
    samples = load_benchmark("coco20i", tmp_path)
    with pytest.warns(UserWarning) as warned:
        loaded = list(samples)
    for message in (f"{hidden}.png' has no foreground pixel", f"{broken}.png' cannot be read"):
        assert sum(message in str(warning.message) for warning in warned) == 1
    for index, (sample, item) in enumerate(zip(loaded, samples.items, strict=True)):
        files = samples.read_references(item).files
        assert len(sample.references) == len(files) == 4 and None not in [r.box for r in sample.references]
        assert all(file.image.stem != broken for file in files)
        assert item.concept != "person" or all(file.image.stem != hidden for file in files)
        kept = [file.image.name for file in files]
        bad = {broken, hidden} if item.concept == "person" else {broken}
        assert all(name == kept[i] for i, name in enumerate(drawn[index]) if name[:-4] not in bad)


def test_cityscapes_references_with_a_broken_label_map_are_replaced(tmp_path):
    write_street(tmp_path, "val", "frankfurt", 0, label_map(ROAD, CAR))
    maps = [write_street(tmp_path, "train", "aachen", number, label_map(ROAD, CAR)) for number in range(6)]
    healthy = load_benchmark("cityscapes", tmp_path)
    broken = healthy.references_of(healthy.items[0])[2].ground_truth.path
    assert broken in maps
    broken.write_bytes(b"not an image")
    samples = load_benchmark("cityscapes", tmp_path)
    with pytest.warns(UserWarning, match=f"label map '.*{broken.name}' cannot be read"):
        (road, car) = samples
    assert len(road.references) == len(car.references) == 4
    files = samples.read_references(samples.items[0]).files
    assert all(file.ground_truth.path != broken for file in files)


def test_unusable_reference_does_not_fail_the_sample(model, processor, polyp_root, tmp_path):
    root = polyp_root(test=5)
    healthy = evaluate(model, "Polyp", processor=processor, root=root, router="sam_only")
    save_image(root / "Polyp/train/mask/train_4.png", size=(30, 30))
    samples = load_benchmark("Polyp", root)
    drawn = [
        "train_4.jpg" in [file.image.name for file in samples.references_of(item)] for item in samples.items
    ]
    assert any(drawn) and not all(drawn)
    options = {"processor": processor, "generation_config": SHORT, "router": "full_reasoning"}
    with pytest.warns(UserWarning, match=r"Polyp: a reference cannot be used.*train_4\.png' is a photo"):
        report = evaluate(model, samples, output_dir=tmp_path / "out", **options)
    assert not report.failed
    assert [bool(record.get("reference_faults")) for record in report.records] == drawn
    assert all(record.get("references_lost", 0) == 0 for record in report.records)
    count = sum(drawn)
    assert f"References that cannot be used: 1, drawn for {count} samples." in report.to_markdown()
    reported = json.loads((tmp_path / "out/report.json").read_text())["unusable_references"]
    assert (reported["samples"], reported["samples_with_fewer"]) == (count, 0)
    assert [fault["samples"] for fault in reported["faults"]] == [count]
    assert "train_4.png' is a photo" in reported["faults"][0]["fault"]
    assert "cannot be used" not in healthy.to_markdown() and "unusable_references" not in healthy.to_dict()


@pytest.mark.parametrize("router", ["sam_only", "full_reasoning"])
def test_unusable_references_of_samples_in_memory_are_dropped(model, processor, polyp_root, tmp_path, router):
    (sample, *_) = load_benchmark("Polyp", polyp_root())
    (tmp_path / "broken.png").write_bytes(b"not an image")
    bad = Reference(tmp_path / "broken.png")
    sample.references.insert(0, bad)
    options = {"processor": processor, "generation_config": SHORT, "router": router}
    report = evaluate(model, [sample], **options)
    assert not report.failed and "broken.png" in report.records[0]["reference_faults"][0]
    assert report.records[0]["references_lost"] == 1
    assert "1 samples had fewer references" in report.to_markdown()


def test_data_check_reports_unusable_references(fss_root, capsys):
    root = fss_root()
    photo_of_different_size(root)
    save_mask(root / "fewshot1000/train/mask/7.png", box=(0, 0, 0, 0))
    assert main(["data", "check", "fewshot1000", "--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert "files: all 32 exist" in output
    assert "samples: 1 of 16 cannot be used" in output, "an empty mask of a target is valid"
    assert "references: 2 of 16 cannot be used" in output
    assert "5.png' is a photo, not a mask" in output and "7.png' has no foreground pixel" in output
    assert output.rstrip().splitlines()[-1].startswith("not complete")


def test_data_check_reads_references_that_no_sample_draws(authors_tree):
    for number in range(40):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    authors_tree.add("test", "Polyp", "Polyp", "test")
    root = authors_tree.write()
    samples = load_benchmark("Polyp", root)
    drawn = {file.image for file in samples.references_of(samples.items[0])}
    other = next(path for path in sorted((root / "Polyp/train/image").iterdir()) if path not in drawn)
    other.write_bytes(b"not an image")
    (check,) = check_benchmark("Polyp", root)
    assert check.inspection.references == 40
    (fault,) = check.inspection.unusable_references
    assert repr(str(other)) in fault


def test_references_with_boxes_are_checked(authors_tree):
    changes = {
        "img_path": ["MGrounding-630k/1.jpg", "MGrounding-630k/2.jpg", "MGrounding-630k/3.jpg"],
        "problem": "What is new?",
        "ref_box": [[0.5, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.6]],
    }
    authors_tree.add("train", "MGrounding", "Difference", "y", **changes)
    root = authors_tree.write()
    with pytest.warns(UserWarning, match=r"reference '.*1\.jpg': box is"):
        (sample,) = load_benchmark("MGrounding", root, split="train")
    assert [reference.box for reference in sample.references] == [pytest.approx((2.4, 3.2, 12.0, 9.6))]
    metadata = json.loads((root / "all_meta.json").read_text())
    metadata["train"]["Difference"][0]["ref_box"][0] = [0.0, 0.0, 1.0, 1.0]
    save_json(root / "all_meta.json", metadata)
    assert len(load_benchmark("MGrounding", root, split="train")[0].references) == 2
