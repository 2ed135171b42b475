"""References that cannot be used give way to others of their class, and are named."""

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


def photo_of_another_size(root):
    save_image(root / BAD.format("mask", "png"), size=(30, 30))


def photo_of_the_same_size(root):
    save_image(root / BAD.format("mask", "png"))


def empty_mask(root):
    save_mask(root / BAD.format("mask", "png"), box=(0, 0, 0, 0))


def broken_mask(root):
    (root / BAD.format("mask", "png")).write_bytes(b"no picture")


def truncated_image(root):
    path = save_image(root / BAD.format("image", "jpg"), size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])


DAMAGES = {
    resize_mask: "mask '.*5.png' has 30 x 30 pixels, but its image has 24 x 16",
    photo_of_another_size: "mask '.*5.png' is a photo, not a mask",
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
    """The samples by index; those that cannot be read are None."""
    found = []
    for index in range(len(samples)):
        try:
            found.append(samples[index])
        except UnreadableSampleError:
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("damage", "words"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_another_of_the_class_takes_the_place(fss_root, damage, words):
    root = fss_root()
    healthy = [names(sample.references) for sample in load_benchmark("fewshot1000", root, split="train")]
    assert sum("5.jpg" in drawn for drawn in healthy) == 3
    damage(root)
    samples = load_benchmark("fewshot1000", root, split="train")
    with pytest.warns(UserWarning, match=words) as notified:
        found = read_all(samples)
    assert len(notified) == 1, "a bad reference is named once"
    # As a target an empty mask is a concept that is not there; everything else makes that one sample unreadable.
    assert [sample is None for sample in found] == [
        index == 5 and damage is not empty_mask for index in range(16)
    ]
    for sample, before in zip(found, healthy, strict=True):
        if sample is None:
            continue
        now = names(sample.references)
        assert len(set(now)) == 4 and "5.jpg" not in now and sample.references_lost == 0
        assert [(place, name) for place, name in enumerate(before) if name != "5.jpg"] == [
            (place, now[place]) for place, name in enumerate(before) if name != "5.jpg"
        ], "the others stay"
        assert len(sample.reference_faults) == ("5.jpg" in before)
        assert resolve_references(sample.references).boxes == ((4, 2, 12, 10),) * 4


def test_what_stands_in_depends_on_seed_and_sample_alone(fss_root):
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
    standing_in = {name for drawn in first for name in drawn}
    assert len(standing_in) > 10 and "5.jpg" not in standing_in


def test_spares_are_read_only_when_they_are_needed(fss_root, monkeypatch):
    samples = load_benchmark("fewshot1000", fss_root(), split="train")
    asked = []
    real = ClassPool.spares
    monkeypatch.setattr(ClassPool, "spares", lambda *arguments: asked.append(1) or real(*arguments))
    list(samples)
    assert not asked


def test_a_class_without_others_gives_fewer(fss_root):
    root = fss_root(size=4)
    for number in (1, 2):
        save_mask(root / f"fewshot1000/train/mask/{number}.png", box=(0, 0, 0, 0))
    with pytest.warns(UserWarning, match="no other to take its place, so that sample .* has") as notified:
        samples = read_all(load_benchmark("fewshot1000", root, split="train"))
    used = [set(names(sample.references)) for sample in samples]
    assert used == [{"3.jpg"}, {"0.jpg", "3.jpg"}, {"0.jpg", "3.jpg"}, {"0.jpg"}]
    assert [sample.references_lost for sample in samples] == [2, 1, 1, 2]
    assert sorted("1.png" in str(warning.message) for warning in notified) == [False, True], "each once"


def test_own_references_are_dropped_one_by_one(tmp_path):
    for stem in ("a", "b", "c"):
        save_image(tmp_path / f"images/{stem}.jpg", seed=ord(stem))
        save_mask(tmp_path / f"masks/{stem}.png")
    (tmp_path / "images/broken.jpg").write_bytes(b"no picture")
    references = [
        "images/broken.jpg",
        "images/missing.jpg",
        {"image": "images/b.jpg", "box": [50, 0, 60, 9]},
        {"image": "images/c.jpg", "mask": "masks/missing.png"},
        {"image": "images/c.jpg", "mask": "masks/c.png"},
    ]
    row = {"image": "images/a.jpg", "mask": "masks/a.png", "prompt": "scratch", "references": references}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.warns(UserWarning, match="sample 'images/a' has 4 fewer") as notified:
        (sample,) = load_benchmark("plain", tmp_path)
    assert names(sample.references) == ["c.jpg"] and sample.references_lost == 4
    for fault, words in zip(sample.reference_faults, ("broken.jpg", "missing.jpg", "b.jpg", "missing.png")):
        assert words in fault
    assert "lies outside its image of 24 x 16 pixels" in sample.reference_faults[2] and len(notified) == 4
    (check,) = check_benchmark("plain", tmp_path)
    assert len(check.missing) == 2 and len(check.inspection.unusable_references) == 2 and not check.complete


def test_coco_references_behave_the_same(tmp_path):
    root = tmp_path / "COCO2014"
    write_coco(root, "train", [("person", "bus")] * 9)
    write_coco(root, "val", [("person", "bus")] * 4)
    healthy = load_benchmark("coco20i", tmp_path)
    drawn = [[reference.image.name for reference in healthy.references_of(item)] for item in healthy.items]
    hidden, broken = "COCO_train2014_000000000003", "COCO_train2014_000000000007"
    assert any(hidden in name for found in drawn for name in found)
    labels = np.full(SIZE[::-1], 3, dtype=np.uint8)  # the bus hides the person
    Image.fromarray(labels).save(root / f"annotations/train2014/{hidden}.png")
    (root / f"annotations/train2014/{broken}.png").write_bytes(b"no picture")
    samples = load_benchmark("coco20i", tmp_path)
    with pytest.warns(UserWarning) as notified:
        found = list(samples)
    for words in (f"{hidden}.png' has no foreground pixel", f"{broken}.png' cannot be read"):
        assert sum(words in str(warning.message) for warning in notified) == 1
    for index, (sample, item) in enumerate(zip(found, samples.items, strict=True)):
        files = samples.read_references(item).files
        assert len(sample.references) == len(files) == 4 and None not in [r.box for r in sample.references]
        assert all(file.image.stem != broken for file in files)
        assert item.concept != "person" or all(file.image.stem != hidden for file in files)
        kept = [file.image.name for file in files]
        bad = {broken, hidden} if item.concept == "person" else {broken}
        assert all(name == kept[place] for place, name in enumerate(drawn[index]) if name[:-4] not in bad)


def test_cityscapes_goes_on_without_a_broken_map(tmp_path):
    write_street(tmp_path, "val", "frankfurt", 0, label_map(ROAD, CAR))
    maps = [write_street(tmp_path, "train", "aachen", number, label_map(ROAD, CAR)) for number in range(6)]
    healthy = load_benchmark("cityscapes", tmp_path)
    broken = healthy.references_of(healthy.items[0])[2].ground_truth.path
    assert broken in maps
    broken.write_bytes(b"no picture")
    samples = load_benchmark("cityscapes", tmp_path)
    with pytest.warns(UserWarning, match=f"labels '.*{broken.name}' cannot be read"):
        (road, car) = samples
    assert len(road.references) == len(car.references) == 4
    files = samples.read_references(samples.items[0]).files
    assert all(file.ground_truth.path != broken for file in files)


def test_a_bad_reference_costs_no_sample(model, processor, polyp_root, tmp_path):
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
    notified = json.loads((tmp_path / "out/report.json").read_text())["unusable_references"]
    assert (notified["samples"], notified["samples_with_fewer"]) == (count, 0)
    assert [fault["samples"] for fault in notified["faults"]] == [count]
    assert "train_4.png' is a photo" in notified["faults"][0]["fault"]
    assert "cannot be used" not in healthy.to_markdown() and "unusable_references" not in healthy.to_dict()


@pytest.mark.parametrize("router", ["sam_only", "full_reasoning"])
def test_samples_in_memory_go_on_without_a_bad_reference(model, processor, polyp_root, tmp_path, router):
    (sample, *_) = load_benchmark("Polyp", polyp_root())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = Reference(tmp_path / "broken.png")
    sample.references.insert(0, bad)
    options = {"processor": processor, "generation_config": SHORT, "router": router}
    report = evaluate(model, [sample], **options)
    assert not report.failed and "broken.png" in report.records[0]["reference_faults"][0]
    assert report.records[0]["references_lost"] == 1
    assert "1 samples had fewer references" in report.to_markdown()


def test_data_check_names_bad_references(fss_root, capsys):
    root = fss_root()
    photo_of_another_size(root)
    save_mask(root / "fewshot1000/train/mask/7.png", box=(0, 0, 0, 0))
    assert main(["data", "check", "fewshot1000", "--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert "files: all 32 are there" in output
    assert "samples: 1 of 16 cannot be used" in output, "as a target, an empty mask is no fault"
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
    other.write_bytes(b"no picture")
    (check,) = check_benchmark("Polyp", root)
    assert check.inspection.references == 40
    (fault,) = check.inspection.unusable_references
    assert repr(str(other)) in fault


def test_references_with_boxes_are_tried(authors_tree):
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
