"""The groups of ConceptShapes outside Table 1: "which one" and "hidden rule"."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from conceptseg_hf.data import ConceptSample, ConceptShapes, load_benchmark
from conceptseg_hf.data.concept_shapes.families import FURTHER_GROUPS, VARIANTS, coexistence
from conceptseg_hf.data.concept_shapes.families.hidden_rule import (
    _EXTENT,
    SELECTORS,
    Rule,
    random_rule,
    rule_scene,
)
from conceptseg_hf.data.concept_shapes.rendering import SHAPES, draw_shape
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS, Scene


@pytest.fixture(scope="module")
def which_one() -> list[ConceptSample]:
    return list(ConceptShapes("test", length=120, groups=["which one"]))


def _color_difference(first: ConceptSample, mask: np.ndarray) -> float:
    """Mean color difference between the pixels of the target and those of a mask."""
    pixels = np.asarray(first.image, dtype=float)
    target = np.asarray(first.mask) > 0
    return float(np.abs(pixels[target].mean(0) - pixels[mask].mean(0)).max())


def test_which_one_contains_every_family(which_one: list[ConceptSample]) -> None:
    families = [family for members in FURTHER_GROUPS["which one"][1].values() for family in members]
    assert {sample.family for sample in which_one} == {family.__name__ for family in families}
    assert {sample.group for sample in which_one} == {"which one"}
    assert {sample.level for sample in which_one} == {"CR"}
    assert {sample.stratum for sample in which_one} == {"shared noun", "identical look"}
    assert len({sample.sample_id for sample in which_one}) == len(which_one)


def test_candidates_contain_the_target_and_siblings_with_its_noun(which_one: list[ConceptSample]) -> None:
    source = ConceptShapes("test", length=120, groups=["which one"])
    for index, sample in enumerate(which_one):
        roles = [candidate.role for candidate in sample.candidates]
        assert roles.count("target") == 1 and len(roles) >= 2
        target = sample.candidates[roles.index("target")].mask
        assert np.array_equal(target, np.asarray(sample.mask) > 0)
        looks = {
            item.mask.tobytes(): item.look for item in source.task(index).scene.objects if item.mask.any()
        }
        assert sample.answer == looks[target.tobytes()].shape in SHAPES
        assert sample.think.endswith(sample.answer)
        siblings = [c.mask for c in sample.candidates if c.role in ("sibling", "other reading")]
        assert siblings, "at least one object must share the noun"
        for mask in siblings:
            if not mask.any():
                continue
            assert looks[mask.tobytes()].shape == sample.answer
            if sample.stratum == "identical look":
                assert looks[mask.tobytes()] == looks[target.tobytes()]


def test_siblings_with_identical_look_have_the_same_color(which_one: list[ConceptSample]) -> None:
    checked = 0
    for sample in which_one:
        if sample.stratum == "identical look":
            for candidate in sample.candidates:
                if candidate.role == "sibling" and candidate.mask.sum() > 60:
                    assert _color_difference(sample, candidate.mask) < 16
                    checked += 1
    assert checked > 40


def test_coexistence_variants_differ_in_references_and_target_object() -> None:
    assert list(VARIANTS.items()) == [(coexistence, 2)]
    source = ConceptShapes("test", length=400, groups=["which one"])
    found = [sample for sample in source if sample.family == "coexistence"]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.image.tobytes() == second.image.tobytes()
        assert first.prompt == second.prompt
        assert first.rule != second.rule
        assert not np.array_equal(np.asarray(first.mask), np.asarray(second.mask))
        assert [c.role for c in first.candidates].count("other reading") == 1
        assert first.references[0].image.tobytes() != second.references[0].image.tobytes()


def test_selected_groups_have_the_samples_of_the_whole_split() -> None:
    whole = [
        sample for sample in ConceptShapes("val", length=48) if sample.group in ("saliency", "difference")
    ]
    chosen = list(ConceptShapes("val", length=len(whole), groups=["difference", "saliency"]))
    assert [sample.sample_id for sample in chosen] == [sample.sample_id for sample in whole]
    for first, second in zip(chosen, whole, strict=True):
        assert first.image.tobytes() == second.image.tobytes() and first.prompt == second.prompt


def test_splits_have_different_samples() -> None:
    images = {
        split: ConceptShapes(split, groups=["hidden rule"])[3].image.tobytes()
        for split in ("train", "val", "test", "test-compositional", "test-rules")
    }
    assert len(set(images.values())) == len(images)


@pytest.mark.parametrize(
    ("split", "groups", "message"),
    [
        ("test", ["which"], "'which'"),
        ("test", [], "groups is"),
        ("test-rules", ["saliency"], "hidden rule"),
    ],
)
def test_invalid_groups_are_rejected(split: str, groups: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptShapes(split, groups=groups)


def test_groups_of_a_file_benchmark_are_rejected(tmp_path) -> None:
    with pytest.raises(ValueError, match="groups"):
        load_benchmark("plain", tmp_path, groups=["which one"])


# Hidden rules


def _matching_objects(scene: Scene, rule: Rule, size: int) -> list[int]:
    """Return the objects that satisfy a rule, computed independently."""
    has = [
        i
        for i, item in enumerate(scene.objects)
        if all(getattr(item.look, kind) == word for kind, word in rule.attributes)
    ]
    if rule.selector == "only":
        colors = [item.look.color for item in scene.objects]
        return [i for i in has if colors.count(colors[i]) == 1]
    if rule.selector is None:
        return has
    values = {
        "largest": lambda item: item.radius * _EXTENT[item.look.shape],
        "smallest": lambda item: -item.radius * _EXTENT[item.look.shape],
        "leftmost": lambda item: -item.cx,
        "rightmost": lambda item: item.cx,
        "highest": lambda item: -item.cy,
        "lowest": lambda item: item.cy,
    }
    return [max(has, key=lambda i: values[rule.selector](scene.objects[i]))]


@pytest.mark.parametrize("new", [False, True])
def test_exactly_one_object_satisfies_a_rule(new: bool) -> None:
    rng = np.random.default_rng(4)
    selectors = set()
    for _ in range(150):
        rule = random_rule(rng, new)
        scene, roles = rule_scene(rng, 96, rule, held_out=False)
        assert _matching_objects(scene, rule, 96) == [0] and roles[0] == "target"
        assert rule.is_held_out == new
        selectors.add(rule.selector)
    assert set(SELECTORS) <= selectors


def test_distractors_satisfy_parts_of_a_joint_rule() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        rule = random_rule(rng)
        _, roles = rule_scene(rng, 96, rule)
        if rule.selector in SELECTORS and rule.attributes:
            assert "selector only" in roles and "attribute only" in roles
        elif len(rule.attributes) == 2:
            assert roles.count("one attribute") >= 2


def test_held_out_rules_are_drawn_only_in_their_split() -> None:
    def rules(split: str) -> set[str]:
        return {sample.rule for sample in ConceptShapes(split, length=150, groups=["hidden rule"])}

    new = rules("test-rules")
    assert not new & rules("train") and not new & rules("test")
    assert all(rule.split()[1] in SELECTORS and len(rule.split()) >= 3 for rule in new)


def test_held_out_looks_appear_only_in_the_compositional_split() -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        source = ConceptShapes(split, length=60, groups=["which one", "hidden rule"])
        scenes = [
            scene
            for index in range(60)
            for scene in (
                source.task(index).scene,
                *(reference for reference, _ in source.task(index).references),
            )
        ]
        return {(item.look.color, item.look.shape) for scene in scenes for item in scene.objects}

    assert not pairs("train") & HELD_OUT_PAIRS
    assert pairs("test-compositional") & HELD_OUT_PAIRS


@pytest.mark.parametrize("shape", SHAPES)
def test_extent_is_the_square_root_of_the_area(shape: str) -> None:
    area = draw_shape(256, shape, 128, 128, 100).mask(256).sum()
    assert np.sqrt(area) / 100 == pytest.approx(_EXTENT[shape], abs=0.02)


def test_images_are_identical_on_every_machine() -> None:
    digest = hashlib.sha256()
    for sample in ConceptShapes("test", length=40, groups=["which one", "hidden rule"]):
        digest.update(sample.image.tobytes() + sample.mask.tobytes() + sample.prompt.encode())
        for reference in sample.references:
            digest.update(reference.image.tobytes() + repr(reference.box).encode())
    assert digest.hexdigest()[:16] == "4036687206f245ec"
