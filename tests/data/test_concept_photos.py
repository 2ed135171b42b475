"""ConceptPhotos: cut-out objects, compositing, families and splits, on drawn and on real photographs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_photographs import REAL, needs_real_photographs
from trees import write_photos

from conceptseg_hf.data import ConceptPhotos, load_benchmark
from conceptseg_hf.data.check import check_benchmark
from conceptseg_hf.data.concept_photos.compositing import Placement, compose, place
from conceptseg_hf.data.concept_photos.cutouts import Cutout, is_connected
from conceptseg_hf.data.concept_photos.families import FAMILIES
from conceptseg_hf.evaluation import evaluate


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def samples(root) -> list:
    return list(ConceptPhotos(root, length=2 * len(FAMILIES), size=128))


def test_a_round_has_every_family(samples):
    assert Counter(sample.family for sample in samples) == {
        family.__name__: 2 * count for family, count in Counter(row[2] for row in FAMILIES).items()
    }
    for sample in samples:
        mask = np.asarray(sample.mask) > 0
        assert sample.image.size == sample.mask.size == (128, 128) and sample.dataset == "concept-photos"
        assert sample.think.endswith(sample.answer) and sample.present is bool(mask.any())
        assert sample.present == (sample.family != "absent")
        if sample.candidates:
            target, *others = (
                sample.candidates
                if sample.family != "coexistence"
                else sorted(sample.candidates, key=lambda candidate: candidate.role != "target")
            )
            assert target.role == "target" and np.array_equal(target.mask, mask)
            assert not any((target.mask & other.mask).any() for other in others)
        for reference in sample.references:
            assert reference.mask is None or np.asarray(reference.mask).any()


def test_samples_depend_on_index_seed_and_split_alone(root, samples):
    again = ConceptPhotos(root, length=20, size=128)
    for index in (13, 2, 7):
        assert again[index].image.tobytes() == samples[index].image.tobytes()
        assert again[index].prompt == samples[index].prompt
    others = ConceptPhotos(root, size=128, seed=7), ConceptPhotos(root, "train", size=128)
    assert all(other[2].image.tobytes() != samples[2].image.tobytes() for other in others)


def test_difference_shows_the_scene_without_the_object(samples):
    sample = next(sample for sample in samples if sample.family == "difference")
    (before,) = sample.references
    changed = (np.asarray(sample.image) != np.asarray(before.image)).any(axis=2)
    mask = np.asarray(sample.mask) > 0
    assert before.mask is None and (changed & mask).sum() > 0.9 * mask.sum()
    grown = np.zeros_like(mask)
    rows, columns = np.nonzero(mask)
    grown[max(0, rows.min() - 3) : rows.max() + 4, max(0, columns.min() - 3) : columns.max() + 4] = True
    assert not (changed & ~grown).any()


def test_coexistence_has_one_target_and_two_readings(samples):
    pairs = [sample for sample in samples if sample.family == "coexistence"]
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.image.tobytes() == second.image.tobytes() and first.prompt == second.prompt
        assert not (np.asarray(first.mask) & np.asarray(second.mask)).any()


def test_relations_and_ordinals_hold(root):
    for sample in islice(ConceptPhotos(root, length=60, size=128), 60):
        if sample.family not in ("relation", "ordinal"):
            continue
        centers = {
            number: np.argwhere(candidate.mask).mean(axis=0)[::-1]
            for number, candidate in enumerate(sample.candidates)
        }
        if sample.family == "ordinal":
            order = sorted(centers, key=lambda number: centers[number][0], reverse="right" in sample.prompt)
            position = next(
                i for i, word in enumerate(("first", "second", "third", "fourth")) if word in sample.prompt
            )
            assert order[position] == 0
        else:
            offset = centers[0] - centers[2]
            axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[
                next(word for word in ("left of", "right of", "above", "below") if word in sample.prompt)
            ]
            assert np.sign(offset[axis]) == sign and abs(offset[axis]) > abs(offset[1 - axis])


def test_later_objects_occlude_earlier_ones_and_stay_inside():
    cutout = Cutout(Image.new("RGBA", (60, 30), (255, 0, 0, 255)), "bus", Path("a"))
    background = Image.new("RGB", (100, 100))
    scene = compose(
        background, [Placement(cutout, 10, 10, 60, match=0.0), Placement(cutout, 40, 20, 60, match=0.0)]
    )
    assert scene.masks[1].sum() == 60 * 30 and scene.masks[0].sum() == 60 * 30 - 30 * 20
    assert not (scene.masks[0] & scene.masks[1]).any() and scene.box(1) == (40, 20, 100, 50)
    rng = np.random.default_rng(0)
    for _ in range(20):
        placements = place(rng, [cutout] * 3, 100, (0.2, 0.3))
        boxes = [placement.box for placement in placements]
        assert all(0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 100 for x1, y1, x2, y2 in boxes)
    assert place(rng, [cutout] * 3, 100, (0.9, 1.0)) is None


def test_color_matching_moves_objects_toward_their_surroundings():
    cutout = Cutout(Image.new("RGBA", (20, 20), (200, 0, 0, 255)), "bus", Path("a"))
    background = Image.new("RGB", (60, 60), (0, 0, 200))
    red = [
        np.asarray(compose(background, [Placement(cutout, 20, 20, 20, match=match)]).image)[30, 30, 0]
        for match in (0.0, 0.5, 1.0)
    ]
    assert red == [200, 100, 0]


def test_connected_masks():
    mask = np.zeros((120, 90), dtype=bool)
    mask[10:60, 10:60] = True
    assert is_connected(mask)
    mask[80:110, 60:88] = True
    assert not is_connected(mask) and is_connected(mask, fraction=0.6)
    assert not is_connected(np.zeros((9, 9), dtype=bool))


def test_it_is_a_benchmark_by_name(root, model, processor):
    samples = load_benchmark("concept-photos", root, limit=10)
    assert len(samples) == 10 and samples[0].image.size == (320, 320)
    (check,) = check_benchmark("concept-photos", root)
    assert check.found == 1000 and check.fault is None
    report = evaluate(model, "concept-photos", root=root, processor=processor, router="sam_only", limit=10)
    assert not report.failed and {row.group for row in report.rows} >= {"rationality", "which one"}
    assert report.settings["benchmark"] == "concept-photos"


def test_refusals(root, tmp_path):
    with pytest.raises(ValueError, match="no split is named 'val'"):
        ConceptPhotos(root, "val")
    with pytest.raises(ValueError, match="size is 32"):
        ConceptPhotos(root, size=32)
    with pytest.raises(ValueError, match="concept-photos"):
        load_benchmark("concept-photos")
    with pytest.raises(IndexError, match=r"outside of 0\.\.9"):
        ConceptPhotos(root, length=10)[10]
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "samples.csv").write_text("id,image,mask,prompt,split\na,a.png,a.png,crack,test\n")
    with pytest.raises(ValueError, match="no datasets of objects and backgrounds"):
        ConceptPhotos(tmp_path)


@needs_real_photographs
def test_splits_of_real_photographs_share_no_image():
    splits = [ConceptPhotos(REAL, split) for split in ("train", "test")]
    sources = [{item.image for item in samples.library._objects} for samples in splits]
    backgrounds = [set(samples.library._backgrounds) for samples in splits]
    assert not (sources[0] | backgrounds[0]) & (sources[1] | backgrounds[1])
    for samples in splits:
        found = [samples[index] for index in range(len(FAMILIES))]
        assert all(sample.present == (sample.family != "absent") for sample in found)
