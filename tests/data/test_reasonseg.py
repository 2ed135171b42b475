"""ReasonSeg as published by LISA, and the copy on the Hugging Face Hub."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, save_image, save_json

from conceptseg_hf.data import MissingFilesError, UnreadableSampleError, check_benchmark, load_benchmark


def square(label: str, left: int, top: int, side: int) -> dict:
    right, bottom = left + side, top + side
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "points": [[left, top], [right, top], [right, bottom], [left, bottom]],
        "group_id": None,
        "flags": {},
    }


def write(folder, stem, shapes, text=("the thing one sits on",), sentence=True, encoding="utf-8"):
    save_image(folder / f"{stem}.jpg")
    content = {"shapes": shapes, "text": list(text), "is_sentence": sentence}
    return save_json(folder / f"{stem}.json", content, encoding)


def test_shapes_are_drawn_from_large_to_small_with_ignored_regions(tmp_path):
    shapes = [
        square("ignore", 4, 4, 3),  # inside the target, listed first
        square("target", 2, 2, 9),
        square("flag", 14, 2, 6),
        square("Ignore_2", 14, 8, 3),
    ]
    write(tmp_path / "ReasonSeg/val", "1_a", shapes, text=("first", "second"))
    (sample,) = load_benchmark("reasonseg", tmp_path, split="val")
    mask, ignore = np.asarray(sample.mask) == 255, np.asarray(sample.ignore) == 255
    assert (sample.prompt, sample.family, sample.level, sample.group) == (
        "first",
        "sentence",
        "CR",
        "reasoning",
    )
    expected = np.zeros(SIZE[::-1], dtype=bool)
    expected[2:12, 2:12] = True  # outlines included
    hole = np.zeros_like(expected)
    hole[4:8, 4:8] = True
    assert np.array_equal(mask, expected & ~hole)
    assert (
        np.array_equal(ignore[:, :13], hole[:, :13])
        and ignore[8:12, 14:18].all()
        and not ignore[2:7, 14:].any()
    )
    assert sample.box == (2, 2, 12, 12)


def test_companion_files_are_skipped_and_unicode_forms_are_paired(tmp_path):
    folder = tmp_path / "ReasonSeg/val"
    write(folder, "1_a", [square("target", 2, 2, 9)])
    for ending in ("jpg", "json"):
        (folder / f"._1_a.{ending}").write_bytes(b"\x00\x05\x16\x07")
    write(folder, unicodedata.normalize("NFC", "2_é"), [square("target", 2, 2, 9)])
    image_path = folder / f"{unicodedata.normalize('NFC', '2_é')}.jpg"
    image_path.rename(folder / f"{unicodedata.normalize('NFD', '2_é')}.jpg")
    samples = load_benchmark("reasonseg", tmp_path, split="val")
    assert [sample.sample_id for sample in samples] == ["1_a", unicodedata.normalize("NFC", "2_é")]


def test_data_check_reads_annotations(tmp_path):
    folder = tmp_path / "ReasonSeg/val"
    write(folder, "1_a", [square("target", 2, 2, 9)])
    write(folder, "2_b", [square("target", 2, 2, 9)], text=())
    write(folder, "3_c", [{"label": "target", "points": "none"}])
    (check,) = check_benchmark("reasonseg", tmp_path, split="val")
    assert (check.found, check.missing, check.inspection.samples) == (3, (), 3)
    without_text, without_points = check.inspection.unusable
    assert (
        "2_b.json' has no text" in without_text
        and "3_c.json' has no valid label and points" in without_points
    )


def test_without_ignored_shapes_all_pixels_count(tmp_path):
    write(tmp_path / "test", "a", [square("target", 2, 2, 4)], sentence=False)
    (sample,) = load_benchmark("reasonseg", tmp_path)
    assert not np.asarray(sample.ignore).any() and sample.family == "phrase"


def test_files_that_are_not_utf8_are_read_as_cp1252(tmp_path):
    write(tmp_path / "test", "a", [square("target", 2, 2, 4)], text=("the café’s door",), encoding="cp1252")
    (sample,) = load_benchmark("reasonseg", tmp_path)
    assert sample.prompt == "the café’s door"


def test_missing_annotation_is_reported(tmp_path):
    write(tmp_path / "test", "a", [square("target", 2, 2, 4)])
    save_image(tmp_path / "test/b.jpg")
    with pytest.raises(MissingFilesError, match=r"lacks 1 of its 4 files .*\(1 mask\): 'test/b.json'"):
        load_benchmark("reasonseg", tmp_path)
    with pytest.raises(MissingFilesError, match="lacks the folder"):
        load_benchmark("reasonseg", tmp_path, split="val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no list of shapes"),
        ({"shapes": [], "text": [], "is_sentence": True}, "has no text"),
        (
            {"shapes": [{"label": "target"}], "text": ["a"], "is_sentence": True},
            "has no valid label and points",
        ),
    ],
)
def test_malformed_annotations_raise_a_one_sentence_error(tmp_path, content, message):
    save_image(tmp_path / "test/a.jpg")
    save_json(tmp_path / "test/a.json", content)
    with pytest.raises(UnreadableSampleError, match=message) as raised:
        load_benchmark("reasonseg", tmp_path)[0]
    assert raised.value.fields["sample_id"] == "a" and "\n" not in str(raised.value)


@pytest.fixture()
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_hub_copy(tmp_path, datasets):
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[2:6, 3:9] = True
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "mask": datasets.List(datasets.List(datasets.Value("bool"))),
            "image_id": datasets.Value("string"),
            "ann_id": datasets.Value("string"),
            "img_height": datasets.Value("int64"),
            "img_width": datasets.Value("int64"),
        }
    )
    image = Image.open(save_image(tmp_path / "a.png"))
    row = {"image": image, "text": "the thing", "mask": mask.tolist(), "image_id": "a", "ann_id": "0"}
    row |= {"img_height": SIZE[1], "img_width": SIZE[0]}
    folder = tmp_path / "ReasonSeg_val/data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list([row], features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    (sample,) = load_benchmark("reasonseg-hf", tmp_path, split="val")
    assert (sample.prompt, sample.dataset, sample.box) == ("the thing", "reasonseg-hf", (3, 2, 9, 6))
    assert sample.image.tobytes() == image.tobytes() and sample.ignore is None
    assert len(load_benchmark("reasonseg-hf", tmp_path / "ReasonSeg_val", split="val")) == 1
    with pytest.raises(MissingFilesError, match=r"ReasonSeg_test.*download Ricky06662/ReasonSeg_test"):
        load_benchmark("reasonseg-hf", tmp_path)


def test_invalid_parquet_file(tmp_path, datasets):
    folder = tmp_path / "ReasonSeg_test"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        load_benchmark("reasonseg-hf", tmp_path)
