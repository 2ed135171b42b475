"""Duplicates of training images: fingerprints, the check of a benchmark, and reports without them."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from real_photographs import REAL, needs_real_photographs

from conceptseg_hf.cli import main
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.data.check import check_benchmark
from conceptseg_hf.data.duplicates import (
    MAX_DISTANCE,
    find_duplicates,
    fingerprint,
    nearest,
    read_sample_ids,
)
from conceptseg_hf.evaluation import evaluate


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A smooth random picture, as photographs are: noise of 12 x 9 pixels, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture()
def root(tmp_path):
    """Two datasets; four of the six test images repeat training images, one of them that of the other dataset."""
    rows = {
        "a": {
            "train": [scene(0), scene(1), scene(2)],
            "test": [scene(0), scene(1, (80, 60)), ImageEnhance.Brightness(scene(2)).enhance(0.8), scene(9)],
        },
        "b": {"train": [scene(5)], "test": [scene(1), scene(7)]},
    }
    for name, splits in rows.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / "samples.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "image", "mask", "prompt", "split"))
            for split, images in splits.items():
                for number, image in enumerate(images):
                    stem = f"{split}_{number}"
                    image.save(tmp_path / name / f"{stem}.png")
                    mask = Image.new("L", image.size)
                    mask.paste(255, (10, 10, 40, 40))
                    mask.save(tmp_path / name / f"{stem}_mask.png")
                    writer.writerow((stem, f"{stem}.png", f"{stem}_mask.png", "blob", split))
                    if split == "test" and number == 0:  # a second sample of the same image
                        writer.writerow((f"{stem}_again", f"{stem}.png", f"{stem}_mask.png", "spot", split))
    return tmp_path


def test_copies_have_nearly_the_same_fingerprint(tmp_path):
    original = scene(3)
    original.save(tmp_path / "copy.jpg", quality=40)
    copies = [
        original.resize((61, 47)),
        ImageEnhance.Brightness(original).enhance(0.7),
        Image.open(tmp_path / "copy.jpg").convert("RGB"),
    ]
    others = [scene(seed) for seed in range(4, 40)]
    matches = nearest(
        [fingerprint(copy) for copy in copies], [fingerprint(each) for each in [*others, original]]
    )
    assert all(index == len(others) and distance <= 30 and not exact for index, distance, exact in matches)
    ((_, closest, _),) = nearest([fingerprint(original)], [fingerprint(each) for each in others])
    assert closest > MAX_DISTANCE


def test_pixels_decide_what_is_exact():
    image, changed = scene(3), scene(3)
    changed.putpixel((5, 5), (0, 0, 0))
    transposed = Image.frombytes("RGB", (120, 160), image.tobytes())  # the same bytes in another shape
    (same, near, other) = nearest(
        [fingerprint(each) for each in (image.copy(), changed, transposed)], [fingerprint(image)]
    )
    assert same == (0, 0, True) and near[2] is False and near[1] <= 4
    assert other[2] is False and other[1] > MAX_DISTANCE


def test_uniform_images_are_duplicates_only_if_all_pixels_are_equal():
    black, gray = Image.new("RGB", (50, 40)), Image.new("RGB", (50, 40), (90, 90, 90))
    assert nearest([fingerprint(black)], [fingerprint(gray), fingerprint(scene(1))]) == [None]
    assert nearest([fingerprint(black), None], [None, fingerprint(black)]) == [(1, 0, True), None]


@pytest.mark.filterwarnings("ignore:photos")
def test_check_names_duplicates_in_all_datasets(root, capsys):
    (root / "b" / "test_1.png").write_bytes(b"damaged")  # is skipped here, and reported as unusable
    test, train = check_benchmark("photos", root)
    assert train.duplicates is None and test.duplicates.images == (("a", 4), ("b", 2))
    pairs = {
        pair.image.relative_to(root).as_posix(): (
            pair.train_image.relative_to(root).as_posix(),
            pair.is_exact,
        )
        for pair in test.duplicates.found
    }
    assert pairs == {
        "a/test_0.png": ("a/train_0.png", True),
        "a/test_1.png": ("a/train_1.png", False),
        "a/test_2.png": ("a/train_2.png", False),
        "b/test_0.png": ("a/train_1.png", True),
    }
    (check,) = check_benchmark("photos", root, "test")
    assert check.duplicates is None  # nothing to compare with
    file = root / "duplicates.csv"
    assert main(["data", "check", "photos", "--root", str(root), "--duplicates", str(file)]) == 1
    output = capsys.readouterr().out
    assert "4 of 6 images are duplicates of training images (2 exact, 2 near)" in output
    assert "    a: 3 of 4 (1 exact, 2 near)" in output
    assert "      b/test_0.png = a/train_1.png (exact)" in output.replace("\\", "/")
    assert sorted(read_sample_ids(file)) == [
        "a/test_0",
        "a/test_0_again",
        "a/test_1",
        "a/test_2",
        "b/test_0",
        "b/test_0_again",
    ]
    arguments = ["data", "check", "photos", "--root", str(root), "--split", "test", "--duplicates", str(file)]
    assert main(arguments) == 2
    assert "no train split was checked together with another split" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:photos")
def test_a_report_can_leave_samples_out_and_keeps_their_records(root, tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("out")
    options = {"root": root, "processor": processor, "router": "sam_only", "output_dir": folder}
    whole = evaluate(model, "photos", **options)
    excluded = ["a/test_0", "a/test_0_again", "b/test_0", "not/here"]
    report = evaluate(model, "photos", **options, exclude=excluded)
    assert len(whole.records) == 8
    assert report.records == [record for record in whole.records if record["sample_id"] not in excluded]
    assert "excluded 3" in report.to_markdown() and "excluded" not in whole.to_markdown()
    assert len((folder / "records.jsonl").read_text().splitlines()) == 8
    assert "a/test_0" not in (folder / "gallery.html").read_text()
    assert evaluate(model, "photos", **options).records == whole.records
    with pytest.raises(ValueError, match="exclude lists all samples"):
        evaluate(model, "photos", **options, exclude=[record["sample_id"] for record in whole.records])


def test_sample_ids_in_lines(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("a/1\n\n  b/2  \n", encoding="utf-8")
    assert read_sample_ids(file) == ["a/1", "b/2"]


@needs_real_photographs
@pytest.mark.filterwarnings("ignore:photos")
def test_real_photographs():
    """CAMO contains pictures of ECSSD: 12 test images of ECSSD are training images of CAMO."""
    test, train = (load_benchmark("photos", REAL, split) for split in ("test", "train"))
    test.items = [item for item in test.items if item.dataset == "ecssd"]
    train.items = [item for item in train.items if item.dataset in ("ecssd", "camo")]
    duplicates = find_duplicates(test, train)
    assert duplicates.images == (("ecssd", 160),)
    assert len(duplicates.found) == 12
    assert all(pair.distance <= 2 and pair.train_image.parts[-3] == "camo" for pair in duplicates.found)
