"""The authors' tree."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trees import save_image

from conceptseg_hf.data import MissingFilesError, load_benchmark
from conceptseg_hf.data.files import ClassPool, FileReference
from conceptseg_hf.images import load_image
from conceptseg_hf.references import resolve_references


def names(sample) -> list[str]:
    return [reference.image.name for reference in sample.references]


def test_a_single_image_item(polyp_root):
    root = polyp_root()
    samples = load_benchmark("Polyp", root)
    assert len(samples) == 3
    sample = samples[0]
    assert (sample.prompt, sample.level, sample.group) == ("polyp colon segmentation", "CD", "medical lesion")
    assert (sample.dataset, sample.split, sample.sample_id) == ("Polyp", "test", "000000-test_0")
    assert sample.image.tobytes() == load_image(root / "Polyp/test/image/test_0.jpg").tobytes()
    assert sample.mask.mode == "L" and sample.mask.size == sample.image.size
    assert sample.box == (4, 2, 12, 10) and sample.present and sample.ignore is None and not sample.box_only
    assert len(set(names(sample))) == 4 and all(name.startswith("train_") for name in names(sample))
    assert resolve_references(sample.references).boxes == ((4, 2, 12, 10),) * 4


def test_only_the_named_set_and_split_are_listed(authors_tree):
    for number in range(3):
        authors_tree.add("train", "coco2014_Living", "coco2014_Living_polar_bear", f"a{number}")
    authors_tree.add("test", "coco2014_Living", "coco2014_Living_polar_bear", "b")
    authors_tree.add("test", "rare", "Abies_alba", "c")
    root = authors_tree.write()
    (sample,) = load_benchmark("coco2014_Living", root)
    assert sample.prompt == "polar bear"
    assert len(load_benchmark("coco2014_Living", root, split="train")) == 3


def test_items_with_several_images_bring_their_references(authors_tree):
    images = [f"MIG-Bench/images/diff/case_{number}.png" for number in (1, 2)]
    changes = {"img_path": images, "problem": "What is new?", "ref_box": [[0.1, 0.2, 0.5, 0.6]]}
    authors_tree.add("test", "MIG_diff", "diff", "x", **changes)
    changes["img_path"] = ["MGrounding-630k/1.jpg", "MGrounding-630k/2.jpg"]
    authors_tree.add("train", "MGrounding", "Difference", "y", **changes)
    root = authors_tree.write()
    (sample,) = load_benchmark("MIG_diff", root)
    assert (sample.prompt, sample.level, sample.group) == ("What is new?", "CR", "difference")
    assert sample.image.tobytes() == load_image(root / images[1]).tobytes()
    assert names(sample) == ["case_1.png"]
    assert sample.references[0].box is None, "the released evaluation shows no boxes here"
    (sample,) = load_benchmark("MGrounding", root, split="train")
    assert sample.group == "difference"
    assert sample.references[0].box == pytest.approx((2.4, 3.2, 12.0, 9.6))


def test_nothing_is_read_before_it_is_needed(polyp_root):
    root = polyp_root()
    for path in root.rglob("*.*g"):
        path.write_bytes(b"no picture")
    samples = load_benchmark("Polyp", root)
    assert len(samples) == 3
    with pytest.raises(ValueError, match="cannot be read"):
        samples[0]


def test_references_follow_the_seed_and_nothing_else(polyp_root):
    root = polyp_root(test=5)
    whole = [names(sample) for sample in load_benchmark("Polyp", root)]
    assert [names(sample) for sample in load_benchmark("Polyp", root)] == whole
    assert names(load_benchmark("Polyp", root)[3]) == whole[3], "whatever was read before"
    assert [names(sample) for sample in load_benchmark("Polyp", root, limit=2)] == whole[:2]
    other = [names(sample) for sample in load_benchmark("Polyp", root, seed=7)]
    assert other != whole


def test_the_target_is_no_reference_of_itself(polyp_root):
    samples = load_benchmark("Polyp", polyp_root(), split="train")
    for sample, item in zip(samples, samples.items, strict=True):
        assert len(set(names(sample))) == 4 and item.image.name not in names(sample)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 12), copies=st.integers(0, 3), seed=st.integers(0, 99))
def test_draws_are_without_replacement_and_without_the_target(size, copies, seed, tmp_path):
    import random

    target = tmp_path / "target.jpg"
    images = [tmp_path / f"{number}.jpg" for number in range(size)] + [target] * copies
    pool = ClassPool({"a": [FileReference(image) for image in images]})
    drawn = [reference.image for reference in pool.draw("a", random.Random(seed), target)]
    assert target not in drawn and len(set(drawn)) == len(drawn)
    wanted = 1 if len(images) == 2 else 4
    assert len(drawn) == min(wanted, size)
    assert drawn == [reference.image for reference in pool.draw("a", random.Random(seed), target)]
    assert pool.has_reference("a", target) == bool(drawn)


def test_every_reference_can_be_drawn():
    from pathlib import Path
    from random import Random

    images = [Path(str(number)) for number in range(7)]
    pool = ClassPool({"a": [FileReference(image) for image in images]})
    counts = np.zeros(7)
    for seed in range(700):
        for reference in pool.draw("a", Random(seed), images[3]):
            counts[int(reference.image.name)] += 1
    assert counts[3] == 0
    others = np.delete(counts, 3)
    assert others.min() > 0.85 * 700 * 4 / 6 and others.max() < 1.15 * 700 * 4 / 6


def test_two_images_of_a_class_give_one_reference(authors_tree):
    for stem in ("a", "b"):
        authors_tree.add("train", "rare", "Abies", stem)
    authors_tree.add("test", "rare", "Abies", "c")
    root = authors_tree.write()
    assert len(load_benchmark("rare", root)[0].references) == 1
    assert [names(sample) for sample in load_benchmark("rare", root, split="train")] == [["b.jpg"], ["a.jpg"]]


def test_a_class_without_references_is_said(authors_tree):
    authors_tree.add("train", "rare", "Abies", "a")
    for stem in ("c", "d"):
        authors_tree.add("test", "rare", "Picea", stem)
    root = authors_tree.write()
    with pytest.warns(UserWarning, match=r"class 'Picea' has no reference.*2 of 2 samples come without"):
        samples = load_benchmark("rare", root)
    assert samples.without_references == ("Picea",) and samples[0].references == []
    with pytest.warns(UserWarning, match="class 'Abies' has no reference.*1 of 1"):
        load_benchmark("rare", root, split="train")


def test_one_training_image_is_a_reference_of_others(authors_tree):
    authors_tree.add("train", "rare", "Abies", "a")
    authors_tree.add("test", "rare", "Abies", "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (sample,) = load_benchmark("rare", authors_tree.write())
    assert names(sample) == ["a.jpg"]


def test_missing_files_are_counted_at_once(polyp_root):
    root = polyp_root()
    (root / "Polyp/test/image/test_1.jpg").unlink()
    for number in range(3):
        (root / f"Polyp/test/mask/test_{number}.png").unlink()
    with pytest.raises(MissingFilesError) as raised:
        load_benchmark("Polyp", root)
    message = str(raised.value)
    assert "lacks 4 of its" in message and "(3 masks and 1 image)" in message
    assert "Polyp/test/mask/test_0.png" in message and " and 1 more;" in message and "\n" not in message
    assert len(raised.value.missing) == 4
    assert len(load_benchmark("rare", _with_another_set(root))) == 1, "other sets of the tree still load"


def _with_another_set(root):
    import json

    from trees import AuthorsTree

    tree = AuthorsTree(root)
    tree.metadata = json.loads((root / "all_meta.json").read_text())
    tree.add("train", "rare", "Abies", "a")
    tree.add("test", "rare", "Abies", "c")
    return tree.write()


@pytest.mark.parametrize(
    "path", ["../outside.jpg", "/etc/outside.jpg", "a/../../x.jpg", "C:\\x.jpg", "..\\x.jpg"]
)
def test_paths_stay_below_the_root(authors_tree, path):
    authors_tree.add("test", "Polyp", "Polyp", "a")["img_path"] = [path]
    save_image(authors_tree.root / "outside.jpg")
    with pytest.raises(ValueError, match=r"leads out of .*without '\.\.'"):
        load_benchmark("Polyp", authors_tree.write())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b'{"train": {}}', "no objects 'train' and 'test'"),
        (b'{"train": {}, "test": {"a": [{"cls_name": "a"}]}}', "an item without img_path"),
        ('{"train": {"é": []}, "test": {}}'.encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_bad_metadata_is_one_sentence(tmp_path, content, words):
    (tmp_path / "all_meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        load_benchmark("Polyp", tmp_path)
    assert "\n" not in str(raised.value)


def test_no_metadata_at_all(tmp_path):
    with pytest.raises(MissingFilesError, match=r"'Polyp' lacks .*all_meta\.json"):
        load_benchmark("Polyp", tmp_path)


# -- the loader "released" --


def test_released_draws_are_with_replacement_from_one_seed(authors_tree):
    """Four draws a sample, each repeated until it is not the target; `random.seed(42)` once, for all samples."""
    for number in range(3):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    for number in range(5):
        authors_tree.add("test", "Polyp", "Polyp", f"test_{number}")
    root = authors_tree.write()
    chance = random.Random(42)
    wanted = [[f"train_{chance.randrange(3)}.jpg" for _ in range(4)] for _ in range(5)]
    assert any(len(set(drawn)) < 3 for drawn in wanted)
    samples = load_benchmark("Polyp", root, loader="released")
    assert [names(sample) for sample in samples] == wanted
    assert names(samples[3]) == wanted[3], "whatever was read before"
    assert [names(s) for s in load_benchmark("Polyp", root, limit=2, loader="released")] == wanted[:2]
    chance = random.Random(7)
    first = [f"train_{chance.randrange(3)}.jpg" for _ in range(4)]
    assert names(load_benchmark("Polyp", root, seed=7, loader="released")[0]) == first
    usual = load_benchmark("Polyp", root)[0]
    assert len(set(names(usual))) == len(names(usual)) == 3


@pytest.mark.parametrize(("others", "drawn"), [(0, 0), (1, 1), (2, 4), (3, 4)])
def test_released_draws_never_take_the_target(authors_tree, others, drawn):
    """A train split refers to itself: of two images one reference is drawn, of three or more four, of one none."""
    for number in range(others + 1):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class with a single image
        samples = load_benchmark("Polyp", authors_tree.write(), split="train", loader="released")
        for number, sample in enumerate(samples):
            assert len(names(sample)) == drawn and f"train_{number}.jpg" not in names(sample)


def test_released_references_of_a_sample_have_no_boxes(authors_tree):
    """Their loader does not read `ref_box`: no boxes are shown, and none is withheld."""
    images = ["MGrounding-630k/1.jpg", "MGrounding-630k/2.jpg", "MGrounding-630k/3.jpg"]
    changes = {"img_path": images, "problem": "What is new?", "ref_box": [[0.1, 0.2, 0.5, 0.6]] * 2}
    authors_tree.add("train", "MGrounding", "Difference", "y", **changes)
    root = authors_tree.write()
    (usual,) = load_benchmark("MGrounding", root, split="train")
    assert [reference.box is None for reference in usual.references] == [False, False]
    (sample,) = load_benchmark("MGrounding", root, split="train", loader="released")
    resolved = resolve_references(sample.references)
    assert names(sample) == ["1.jpg", "2.jpg"]
    assert resolved.boxes == (None, None) and resolved.proxy is None


def test_released_masks_keep_their_grey_values(authors_tree):
    for number in range(3):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    items = [authors_tree.add("test", "Polyp", "Polyp", f"test_{number}") for number in range(2)]
    root = authors_tree.write()
    grey = Image.open(root / items[0]["mask_path"]).resize(
        (24, 16), Image.Resampling.BICUBIC, (1.3, 1, 23, 15)
    )
    assert set(grey.tobytes()) - {0, 255}
    grey.save(root / items[0]["mask_path"])
    soft, hard = load_benchmark("Polyp", root, loader="released")
    assert soft.soft_mask.tobytes() == grey.tobytes() and hard.soft_mask is None
    assert soft.mask.tobytes() == load_benchmark("Polyp", root)[0].mask.tobytes()
    assert load_benchmark("Polyp", root)[0].soft_mask is None
    with pytest.raises(ValueError, match="loader is 'theirs'; use 'default' or 'released'"):
        load_benchmark("Polyp", root, loader="theirs")


@pytest.mark.parametrize("name", ["LVISRare", "LVISCommon", "iNaturalist", "SASilver_inaturalist"])
def test_names_that_the_released_loader_knows(authors_tree, name):
    """The prompt is the class name without the data set's, underscores as spaces."""
    for number in range(2):
        authors_tree.add("train", name, f"{name}_Abies_alba", f"a{number}")
    authors_tree.add("test", name, f"{name}_Abies_alba", "b")
    (sample,) = load_benchmark(name, authors_tree.write())
    assert (sample.prompt.strip(), sample.dataset, sample.level) == ("Abies alba", name, "CI")


def test_released_draws_fill_four_cells_from_a_single_image(authors_tree):
    authors_tree.add("train", "Polyp", "Polyp", "only")
    authors_tree.add("test", "Polyp", "Polyp", "test_0")
    (sample,) = load_benchmark("Polyp", authors_tree.write(), loader="released")
    assert names(sample) == ["only.jpg"] * 4
