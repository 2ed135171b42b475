"""Cityscapes, with one sample per image and present class."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, save_image

from conceptseg_hf.data import MissingFilesError, UnreadableSampleError, load_benchmark
from conceptseg_hf.data.layouts.cityscapes import CLASSES

ROAD, CAR, EGO = 7, 26, 1


def write(root, split, city, number, labels):
    stem = f"{city}/{city}_{number:06d}_000019"
    save_image(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", seed=number)
    path = root / f"gtFine/{split}/{stem}_gtFine_labelIds.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return path


def label_map(*values):
    labels = np.full(SIZE[::-1], EGO, dtype=np.uint8)
    for column, value in enumerate(values):
        labels[:, 4 * column : 4 * column + 4] = value
    return labels


@pytest.fixture()
def root(tmp_path):
    write(tmp_path, "val", "frankfurt", 0, label_map(ROAD, CAR))
    write(tmp_path, "val", "munster", 1, label_map(ROAD))
    for number in range(8):
        write(tmp_path, "train", "aachen", number, label_map(ROAD, CAR) if number % 2 else label_map(ROAD))
    return tmp_path


def test_classes_are_ordered_by_training_id():
    assert len(CLASSES) == 19 and list(CLASSES.values()) == sorted(CLASSES.values())


def test_one_sample_per_present_class(root):
    samples = load_benchmark("cityscapes", root)
    assert samples.split == "val"
    assert [sample.prompt for sample in samples] == ["road", "car", "road"]
    car = samples[1]
    assert car.sample_id == "frankfurt_000000_000019-car" and car.group == "urban scenes"
    assert car.box == (4, 0, 8, SIZE[1])
    ignore = np.asarray(car.ignore) == 255
    assert ignore[:, 8:].all() and not ignore[:, :8].any(), "labels other than the 19 are ignored"


def test_references_contain_the_class(root):
    samples = load_benchmark("cityscapes", root)
    car, road = samples[1], samples[0]
    assert len(car.references) == 4 and len(road.references) == 4
    assert all(reference.box == (4, 0, 8, SIZE[1]) for reference in car.references)
    again = load_benchmark("cityscapes", root)[1]
    assert [r.image.tobytes() for r in again.references] == [r.image.tobytes() for r in car.references]


def test_class_of_two_images_gives_one_reference(root):
    bus = CLASSES["bus"]
    for number in (20, 21):
        write(root, "train", "bremen", number, label_map(bus))
    write(root, "val", "zzz", 2, label_map(bus))
    assert len(load_benchmark("cityscapes", root)[3].references) == 1
    train = load_benchmark("cityscapes", root, split="train")
    for index, item in enumerate(train.items):
        if item.concept == "bus":
            (reference,) = train.references_of(item)
            assert reference.image != item.image and "bremen" in reference.image.name
            assert len(train[index].references) == 1


def test_without_train_images_there_are_no_references(tmp_path):
    write(tmp_path, "val", "frankfurt", 0, label_map(ROAD, CAR))
    with pytest.warns(UserWarning, match=r"2 classes \('road', 'car'\) have no reference"):
        assert load_benchmark("cityscapes", tmp_path)[0].references == []


def test_companion_files_of_macos_are_skipped(root):
    before = [sample.sample_id for sample in load_benchmark("cityscapes", root)]
    for path in [*root.glob("leftImg8bit/*/*/*.png"), *root.glob("gtFine/*/*/*.png")]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    assert [sample.sample_id for sample in load_benchmark("cityscapes", root)] == before


def test_missing_and_unreadable_label_maps(root):
    path = root / "gtFine/val/munster/munster_000001_000019_gtFine_labelIds.png"
    path.write_bytes(b"broken")
    samples = load_benchmark("cityscapes", root)
    assert len(samples) == 3
    with pytest.raises(UnreadableSampleError, match="cannot be read") as raised:
        samples[2]
    assert raised.value.ground_truth is None
    path.unlink()
    with pytest.raises(MissingFilesError, match=r"\(1 mask\): 'gtFine/val/munster"):
        load_benchmark("cityscapes", root)
    with pytest.raises(MissingFilesError, match="put leftImg8bit and gtFine there"):
        load_benchmark("cityscapes", root / "gtFine")
