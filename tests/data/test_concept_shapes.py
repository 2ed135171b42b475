from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.data import ConceptSample, ConceptShapes, load_benchmark
from conceptseg_hf.data.concept_shapes.benchmark import SPLITS, family_at
from conceptseg_hf.data.concept_shapes.families import GROUPS
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS

ROUND = len(GROUPS) * 3  # every family at least once

TABLE_1_GROUPS = {
    "diverse classes", "optical property", "camouflage", "saliency", "industrial anomaly", "medical lesion",
    "consistency", "difference", "rationality", "spatio-temporality",
}  # fmt: skip


@pytest.fixture(scope="module")
def samples() -> list[ConceptSample]:
    return list(ConceptShapes("test", length=2 * ROUND))


def test_groups_match_table_1() -> None:
    assert {group for _, group, _ in GROUPS} == TABLE_1_GROUPS


def test_samples_are_consistent(samples: list[ConceptSample]) -> None:
    assert {sample.group for sample in samples} == TABLE_1_GROUPS
    for sample in samples:
        assert (
            sample.image.mode == "RGB"
            and sample.mask.mode == "L"
            and sample.image.size == sample.mask.size == (128, 128)
        )
        mask = np.asarray(sample.mask)
        assert set(np.unique(mask)) <= {0, 255}
        assert sample.present == bool(mask.any()) == (sample.family != "absent")
        if sample.present:
            assert sample.box == mask_to_box(mask > 0)
        assert 1 <= len(sample.answer.split()) <= 3
        assert sample.think.endswith(sample.answer)
        for reference in sample.references:
            if reference.box is not None:
                x1, y1, x2, y2 = reference.box
                assert 0 <= x1 < x2 <= reference.image.width and 0 <= y1 < y2 <= reference.image.height


def test_only_reasoning_prompts_are_long(samples: list[ConceptSample]) -> None:
    assert all(len(sample.prompt.split()) >= 5 for sample in samples if sample.level == "CR")
    assert all(len(sample.prompt.split()) <= 3 for sample in samples if sample.level != "CR")


def test_samples_depend_only_on_split_and_index() -> None:
    again = ConceptShapes("test")
    for index in (0, 5, 23):
        first, second = ConceptShapes("test")[index], again[index]
        assert first.image.tobytes() == second.image.tobytes() and first.prompt == second.prompt
    images = {split: ConceptShapes(split)[7].image.tobytes() for split in SPLITS}
    assert len(set(images.values())) == len(SPLITS)


def test_images_are_identical_on_every_machine() -> None:
    digest = hashlib.sha256()
    for sample in ConceptShapes("test", length=len(GROUPS)):
        digest.update(sample.image.tobytes() + sample.mask.tobytes() + sample.prompt.encode())
    assert digest.hexdigest()[:16] == "58569503574c3812"


def test_default_seed_uses_one_generator_per_task() -> None:
    shapes = ConceptShapes("test")
    for index in range(len(GROUPS)):
        plain = family_at(index)[2](np.random.default_rng([SPLITS["test"], index]), 128, False)
        task = shapes.task(index)
        assert np.array_equal(task.scene.pixels, plain.scene.pixels)
        for (scene, box), (other, other_box) in zip(task.references, plain.references, strict=True):
            assert np.array_equal(scene.pixels, other.pixels) and box == other_box


def test_different_seed_redraws_only_the_references() -> None:
    redrawn = set()
    for first, second, third in zip(
        ConceptShapes("test", length=2 * ROUND),
        ConceptShapes("test", length=2 * ROUND, seed=43),
        load_benchmark("concept-shapes", limit=2 * ROUND, seed=43),
        strict=True,
    ):
        for name in ("sample_id", "prompt", "answer", "rule", "box"):
            assert getattr(first, name) == getattr(second, name)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.mask.tobytes() == second.mask.tobytes()
        pairs = list(zip(first.references, second.references, strict=True))
        changed = {one.image.tobytes() != other.image.tobytes() for one, other in pairs}
        assert len(changed) <= 1, "all references of a sample are redrawn, or none"
        redrawn |= {first.family} if True in changed else set()
        assert [one.image.tobytes() for one in second.references] == [
            one.image.tobytes() for one in third.references
        ]
    assert {"attribute", "shadow", "camouflage", "same_object", "odd_one_out"} <= redrawn
    assert not {"changed", "tracking", "view"} & redrawn, "a first frame or view is part of the question"


def _pairs(sample_index: int, split: str) -> set[tuple[str, str]]:
    task = ConceptShapes(split).task(sample_index)
    scenes = [task.scene, *(scene for scene, _ in task.references)]
    return {
        (item.look.color, item.look.shape) for scene in scenes for item in scene.objects if not item.look.kind
    }


def test_held_out_pairs_are_drawn_only_in_the_compositional_split() -> None:
    for index in range(5 * ROUND):
        assert not _pairs(index, "train") & HELD_OUT_PAIRS
    colored = [
        i
        for i in range(ROUND)
        if family_at(i)[2].__name__
        in ("attribute", "saliency", "common_attribute", "changed", "relation", "tracking")
    ]
    assert all(_pairs(index, "test-compositional") & HELD_OUT_PAIRS for index in colored)


def test_absent_phrases_describe_no_object() -> None:
    shapes = ConceptShapes("test")
    for index in [i for i in range(10 * len(GROUPS)) if family_at(i)[2].__name__ == "absent"]:
        task = shapes.task(index)
        assert not any(item.look.matches(task.prompt.split()) for item in task.scene.objects)


def test_present_phrases_describe_exactly_the_mask() -> None:
    shapes = ConceptShapes("test")
    for index in [i for i in range(10 * len(GROUPS)) if family_at(i)[2].__name__ == "attribute"]:
        task = shapes.task(index)
        assert np.array_equal(task.scene.mask_of(task.prompt.split()), task.mask)


def test_a_changed_scene_differs_only_at_the_new_object() -> None:
    shapes = ConceptShapes("test")
    index = next(i for i in range(10 * ROUND) if family_at(i)[2].__name__ == "changed")
    task = shapes.task(index)
    before = task.references[0][0].pixels
    difference = (task.scene.pixels != before).any(-1)
    x1, y1, x2, y2 = mask_to_box(task.mask)
    outside = difference.copy()
    outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
    assert difference.any() and not outside.any()


@pytest.mark.parametrize("size", [64, 224])
def test_image_sizes(size: int) -> None:
    for sample in ConceptShapes("val", length=len(GROUPS), size=size):
        assert sample.image.size == (size, size)


def test_exported_files_match_the_samples(tmp_path) -> None:
    index_path = ConceptShapes("val", length=len(GROUPS)).export(tmp_path / "shapes")
    rows = [json.loads(line) for line in index_path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(GROUPS)
    for row, sample in zip(rows, ConceptShapes("val", length=len(GROUPS)), strict=True):
        assert Image.open(index_path.parent / row["image"]).tobytes() == sample.image.tobytes()
        assert Image.open(index_path.parent / row["mask"]).tobytes() == sample.mask.tobytes()
        assert len(row["references"]) == len(sample.references)
        assert all((index_path.parent / reference["image"]).exists() for reference in row["references"])


def test_to_dataset(tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = ConceptShapes("val", length=5).to_dataset()
    assert len(dataset) == 5
    sample = ConceptShapes("val", length=5)[3]
    assert dataset[3]["prompt"] == sample.prompt
    assert dataset[3]["image"].convert("RGB").tobytes() == sample.image.tobytes()
    assert len(dataset[3]["reference_images"]) == len(sample.references)


def test_sequence_protocol() -> None:
    shapes = load_benchmark("concept-shapes", split="val", limit=4)
    assert len(shapes) == 4 and shapes[-1].sample_id == shapes[3].sample_id
    with pytest.raises(IndexError):
        shapes[4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_benchmark("coco"), "no benchmark is named 'coco'"),
        (lambda: ConceptShapes("dev"), "no split is named 'dev'"),
        (lambda: ConceptShapes(size=8), "at least 32 pixels"),
    ],
)
def test_invalid_arguments_raise_errors_with_a_remedy(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
