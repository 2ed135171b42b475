"""Custom data: the benchmark "plain"."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import save_image, save_mask

from conceptseg_hf.data import (
    ConceptShapes,
    MissingFilesError,
    UnreadableSampleError,
    as_dataset,
    load_benchmark,
)
from conceptseg_hf.references import resolve_references


@pytest.fixture()
def root(tmp_path):
    for stem in ("a", "b"):
        save_image(tmp_path / f"images/{stem}.jpg", seed=ord(stem))
        save_mask(tmp_path / f"masks/{stem}.png")
    return tmp_path


def write_lines(root, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / "samples.jsonl").write_text(text + "\n", encoding="utf-8")


A = {"image": "images/a.jpg", "mask": "masks/a.png", "prompt": "scratch"}
B = {"image": "images/b.jpg", "mask": "masks/b.png", "prompt": "dent"}


def test_jsonl(root):
    references = ["images/b.jpg", {"image": "images/b.jpg", "mask": "masks/b.png"}]
    references.append({"image": "images/b.jpg", "box": [1, 2, 3, 4]})
    write_lines(
        root, A | {"references": references, "level": "CD", "group": "mine"}, "", B | {"id": "second"}
    )
    first, second = load_benchmark("plain", root)
    assert (first.prompt, first.level, first.group, first.sample_id) == ("scratch", "CD", "mine", "images/a")
    assert resolve_references(first.references).boxes == (None, (4, 2, 12, 10), (1, 2, 3, 4))
    assert (second.sample_id, second.references, second.level) == ("second", [], "CR")


def test_examples_of_the_documentation_can_be_loaded(tmp_path):
    text = (Path(__file__).parents[2] / "docs/own_data.md").read_text(encoding="utf-8")
    lines = text.split("```json\n")[1].split("```")[0]
    table = text.split("```csv\nimage,mask,prompt")[1].split("```")[0]
    for number in (1, 2, 101, 102, 103):
        save_image(tmp_path / f"images/{number:04d}.jpg", seed=number, size=(240, 200))
        save_mask(tmp_path / f"masks/{number:04d}.png", size=(240, 200))
    (tmp_path / "samples.jsonl").write_text(lines)
    (first, second), (third,) = (
        load_benchmark("plain", tmp_path, split=split) for split in ("test", "train")
    )
    assert (first.prompt, third.prompt, first.references) == ("the scratch", "the scratch", [])
    assert resolve_references(second.references).boxes == ((4, 2, 12, 10), (40, 30, 200, 180), None)
    assert (first.sample_id, first.level) == ("images/0001", "CR")
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.csv").write_text(f"image,mask,prompt{table}")
    (sample,) = load_benchmark("plain", tmp_path)
    assert resolve_references(sample.references).boxes == ((4, 2, 12, 10), None)


def test_only_newlines_separate_rows(root):
    line = json.dumps(A | {"prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    (root / "samples.jsonl").write_text(line + "\r\n", encoding="utf-8")
    [sample] = load_benchmark("plain", root)
    assert sample.prompt == "one\u2028two\x85three"


def prompts(root, split):
    return [sample.prompt for sample in load_benchmark("plain", root, split=split)]


def test_rows_without_a_split_are_in_test(root):
    write_lines(root, A | {"split": "train"}, B)
    for split, expected in (("train", ["scratch"]), ("test", ["dent"])):
        with pytest.warns(
            UserWarning, match=r"plain: 1 of 2 rows have no split and are in 'test'; give each row"
        ):
            assert prompts(root, split) == expected
    with pytest.raises(
        ValueError, match=r"'plain' has no split 'val'; its rows are in 'train' \(1\), 'test' \(1\)\.$"
    ):
        load_benchmark("plain", root, split="val")


def test_warns_if_no_row_has_a_split_unless_the_split_is_test(root):
    write_lines(root, A, B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts(root, "test") == ["scratch", "dent"]
    for split in ("train", "val"):
        with pytest.warns(
            UserWarning, match=f"no row has a split, so all 2 samples are in '{split}' as in every"
        ):
            assert prompts(root, split) == ["scratch", "dent"]
    (root / "samples.jsonl").unlink()
    (root / "prompt.txt").write_text("the scratch")
    with pytest.warns(
        UserWarning, match="images/ and masks/ have no splits, so all 2 samples are in 'train'"
    ):
        load_benchmark("plain", root, split="train")


@pytest.mark.parametrize("split", ["dev", "Test", "tset"])
def test_unknown_split_error_lists_the_splits(root, split):
    write_lines(root, A | {"split": "train"}, B | {"split": " test "})
    with pytest.raises(
        ValueError, match=rf"'plain' has no split '{split}'; its rows are in 'train' \(1\), 'test'"
    ):
        load_benchmark("plain", root, split=split)
    assert prompts(root, "test") == ["dent"]


def test_lists_without_samples_are_rejected(root):
    write_lines(root, "", "")
    with pytest.raises(ValueError, match="lists no samples; write one row for each"):
        load_benchmark("plain", root)
    (root / "samples.jsonl").unlink()
    (root / "samples.csv").write_text("image,mask,prompt\n")
    with pytest.raises(ValueError, match="lists no samples; write one row for each"):
        load_benchmark("plain", root)
    (root / "samples.csv").unlink()
    (root / "prompt.txt").write_text("the scratch")
    for path in root.rglob("*.*g"):
        path.unlink()
    with pytest.raises(ValueError, match=r"images/ and masks/ in '.*' hold no images"):
        load_benchmark("plain", root)


def test_csv(root):
    lines = [
        "image,mask,prompt,references",
        "images/a.jpg,masks/a.png,scratch,images/b.jpg|masks/b.png; images/b.jpg",
    ]
    (root / "samples.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")  # as spreadsheets write
    (sample,) = load_benchmark("plain", root)
    assert sample.prompt == "scratch"
    assert resolve_references(sample.references).boxes == ((4, 2, 12, 10), None)


def test_folder(root):
    (root / "prompt.txt").write_text("the scratch\n")
    samples = load_benchmark("plain", root)
    assert [(sample.sample_id, sample.prompt) for sample in samples] == [
        ("a", "the scratch"),
        ("b", "the scratch"),
    ]


def test_companion_files_of_macos_are_skipped(root):
    (root / "prompt.txt").write_text("the scratch")
    for name in ("images/._a.jpg", "masks/._a.png", "images/.DS_Store", "images/.hidden.jpg"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    assert [sample.sample_id for sample in load_benchmark("plain", root)] == ["a", "b"]


@pytest.mark.parametrize(("image_form", "mask_form"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_images_and_masks_are_paired_across_unicode_forms(root, image_form, mask_form):
    image = f"images/{unicodedata.normalize(image_form, 'Ärmel é')}.jpg"
    mask = f"masks/{unicodedata.normalize(mask_form, 'Ärmel é')}.png"
    save_image(root / image, seed=1)
    save_mask(root / mask)
    (root / "prompt.txt").write_text("the scratch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = load_benchmark("plain", root)
    assert len(samples) == 3 and [samples[index].present for index in range(3)] == [True] * 3
    assert "Ärmel é" in [unicodedata.normalize("NFC", sample.sample_id) for sample in samples]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_listed_names_are_found_in_either_unicode_form(root, form):
    other = "NFD" if form == "NFC" else "NFC"
    folder = unicodedata.normalize(form, "Prüfling")
    save_image(root / folder / f"{unicodedata.normalize(form, 'é')}.jpg", seed=1)
    save_mask(root / folder / f"{unicodedata.normalize(form, 'é')}.png")
    name = unicodedata.normalize(other, "Prüfling/é")
    write_lines(root, A, {"image": f"{name}.jpg", "mask": f"{name}.png", "prompt": "dent"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, sample = load_benchmark("plain", root)
    assert sample.box == (4, 2, 12, 10) and sample.sample_id == name, "as written in the list"


def test_rare_formats_are_used_if_there_is_no_common_one(root):
    (root / "prompt.txt").write_text("the scratch")
    (root / "images/a.heic").write_bytes(b"\x00\x00\x00\x1cftypheic")
    save_image(root / "images/c.png", seed=3)
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[2:10, 4:12] = 255
    Image.fromarray(mask).save(root / "masks/c.gif")
    samples = load_benchmark("plain", root)
    assert [sample.sample_id for sample in samples] == ["a", "b", "c"]
    assert samples.items[0].image.name == "a.jpg" and samples[2].box == (4, 2, 12, 10)


def test_samples_with_missing_files_fail_individually(root):
    (root / "prompt.txt").write_text("the scratch\n")
    (root / "masks/b.png").unlink()
    with pytest.warns(UserWarning, match=r"plain: 1 of 2 samples lack files \('b'\) and will fail"):
        samples = load_benchmark("plain", root)
    assert samples[0].sample_id == "a"
    with pytest.raises(UnreadableSampleError, match=r"^sample 'b': mask '.*b\.png' is not a file; give"):
        samples[1]


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200])
def test_invalid_file_names_are_missing_files(root, name):
    write_lines(root, A, B | {"image": f"images/{name}.jpg"}, B | {"references": f"images/{name}.jpg"})
    with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
        samples = load_benchmark("plain", root)
    with pytest.raises(UnreadableSampleError, match=r"\.jpg' is not a file; give the path of an image"):
        samples[1]
    with pytest.warns(UserWarning, match=r"\.jpg' is not a file"):
        assert samples[2].references == []
    with pytest.raises(ValueError, match="is not a folder; give the folder of 'plain'"):
        load_benchmark("plain", name)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            ["images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png"],
            r"4 of its 4 files below '.*' \(2 im",
        ),
        (
            ["images/a.jpg", "masks/b.png"],
            r"2 of its 4 files below '.*' \(1 image and 1 mask\): 'images/a.jpg'",
        ),
    ],
)
def test_error_if_all_samples_have_missing_files(root, lost, message):
    write_lines(root, A, B)
    for path in lost:
        (root / path).unlink()
    with pytest.raises(MissingFilesError, match=message) as raised:
        load_benchmark("plain", root)
    assert repr(str(root)) in str(raised.value) and str(raised.value).endswith("or give another root.")


@pytest.mark.parametrize("reference", ["images/b.jpg", {"image": "images/b.jpg", "box": [1, 2, 3, 4]}])
def test_a_single_reference_needs_no_list(root, reference):
    write_lines(root, A | {"references": reference}, B | {"references": [reference]})
    first, second = (item.references for item in load_benchmark("plain", root).items)
    assert first == second and len(first) == 1


def test_export_of_concept_shapes_can_be_loaded(tmp_path):
    shapes = ConceptShapes("val", length=10)
    shapes.export(tmp_path)
    for sample, original in zip(load_benchmark("plain", tmp_path, split="val"), shapes, strict=True):
        for name in ("sample_id", "prompt", "level", "group", "family", "box", "think", "rule", "answer"):
            assert getattr(sample, name) == getattr(original, name)
        assert np.array_equal(np.asarray(sample.image), np.asarray(original.image))
        assert np.array_equal(np.asarray(sample.mask), np.asarray(original.mask))
        assert resolve_references(sample.references).boxes == resolve_references(original.references).boxes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 of samples.jsonl is not JSON"),
        (["[]"], "line 1 of samples.jsonl is not an object"),
        ([A, {"image": "images/a.jpg", "mask": "masks/a.png"}], "line 2 of samples.jsonl has no prompt"),
        ([A, B | {"references": 5}], "line 2 of samples.jsonl has references that are not a list"),
        ([A | {"references": ["images/b.jpg", 5]}], "a reference without image"),
        ([A | {"references": [{"mask": "masks/a.png"}]}], "a reference without image"),
        ([A | {"references": [{"image": "images/b.jpg", "box": [1]}]}], "box that is not four numbers"),
        ([A, A], "two samples with the id 'images/a'"),
        ([A | {"mask": "../a.png"}], "is outside of"),
    ],
)
def test_malformed_rows_raise_a_one_sentence_error(root, rows, message):
    write_lines(root, *rows)
    with pytest.raises(ValueError, match=message) as raised:
        load_benchmark("plain", root)
    assert "\n" not in str(raised.value)


def test_missing_prompt_and_missing_list(tmp_path, root):
    with pytest.raises(ValueError, match=r"no prompt\.txt"):
        load_benchmark("plain", root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFilesError, match=r"neither samples\.jsonl"):
        load_benchmark("plain", tmp_path / "empty")


def test_as_dataset(root, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_lines(root, A | {"references": [{"image": "images/b.jpg", "mask": "masks/b.png"}, "images/b.jpg"]})
    samples = load_benchmark("plain", root)
    row = as_dataset(samples)[0]
    assert (row["prompt"], row["dataset"], row["box"], row["ignore"]) == (
        "scratch",
        "plain",
        [4, 2, 12, 10],
        None,
    )
    assert np.array_equal(np.asarray(row["mask"]), np.asarray(samples[0].mask))
    assert row["reference_boxes"] == [[4, 2, 12, 10], None] and len(row["reference_images"]) == 2
