"""The layout of the authors' datasets."""

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


def test_single_image_item(polyp_root):
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


def test_only_the_given_dataset_and_split_are_listed(authors_tree):
    for number in range(3):
        authors_tree.add("train", "coco2014_Living", "coco2014_Living_polar_bear", f"a{number}")
    authors_tree.add("test", "coco2014_Living", "coco2014_Living_polar_bear", "b")
    authors_tree.add("test", "rare", "Abies_alba", "c")
    root = authors_tree.write()
    (sample,) = load_benchmark("coco2014_Living", root)
    assert sample.prompt == "polar bear"
    assert len(load_benchmark("coco2014_Living", root, split="train")) == 3


def test_items_with_several_images_contain_their_references(authors_tree):
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


def test_files_are_read_on_access(polyp_root):
    root = polyp_root()
    for path in root.rglob("*.*g"):
        path.write_bytes(b"not an image")
    samples = load_benchmark("Polyp", root)
    assert len(samples) == 3
    with pytest.raises(ValueError, match="cannot be read"):
        samples[0]


def test_references_depend_only_on_seed_and_sample(polyp_root):
    root = polyp_root(test=5)
    whole = [names(sample) for sample in load_benchmark("Polyp", root)]
    assert [names(sample) for sample in load_benchmark("Polyp", root)] == whole
    assert names(load_benchmark("Polyp", root)[3]) == whole[3], "independent of earlier reads"
    assert [names(sample) for sample in load_benchmark("Polyp", root, limit=2)] == whole[:2]
    other = [names(sample) for sample in load_benchmark("Polyp", root, seed=7)]
    assert other != whole


def test_target_is_not_its_own_reference(polyp_root):
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
    count = 1 if len(images) == 2 else 4
    assert len(drawn) == min(count, size)
    assert drawn == [reference.image for reference in pool.draw("a", random.Random(seed), target)]
    assert pool.has_reference("a", target) == bool(drawn)


def test_references_are_drawn_uniformly():
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


def test_class_of_two_images_gives_one_reference(authors_tree):
    for stem in ("a", "b"):
        authors_tree.add("train", "rare", "Abies", stem)
    authors_tree.add("test", "rare", "Abies", "c")
    root = authors_tree.write()
    assert len(load_benchmark("rare", root)[0].references) == 1
    assert [names(sample) for sample in load_benchmark("rare", root, split="train")] == [["b.jpg"], ["a.jpg"]]


def test_warns_about_classes_without_references(authors_tree):
    authors_tree.add("train", "rare", "Abies", "a")
    for stem in ("c", "d"):
        authors_tree.add("test", "rare", "Picea", stem)
    root = authors_tree.write()
    with pytest.warns(
        UserWarning, match=r"class 'Picea' has no reference.*2 of 2 samples have no references"
    ):
        samples = load_benchmark("rare", root)
    assert samples.without_references == ("Picea",) and samples[0].references == []
    with pytest.warns(UserWarning, match="class 'Abies' has no reference.*1 of 1"):
        load_benchmark("rare", root, split="train")


def test_single_training_image_is_a_reference_of_test_samples(authors_tree):
    authors_tree.add("train", "rare", "Abies", "a")
    authors_tree.add("test", "rare", "Abies", "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (sample,) = load_benchmark("rare", authors_tree.write())
    assert names(sample) == ["a.jpg"]


def test_all_missing_files_are_reported_together(polyp_root):
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
    assert len(load_benchmark("rare", _with_another_dataset(root))) == 1, (
        "other datasets of the tree can still be loaded"
    )


def _with_another_dataset(root):
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
def test_paths_outside_of_the_root_are_rejected(authors_tree, path):
    authors_tree.add("test", "Polyp", "Polyp", "a")["img_path"] = [path]
    save_image(authors_tree.root / "outside.jpg")
    with pytest.raises(ValueError, match=r"is outside of .*without '\.\.'"):
        load_benchmark("Polyp", authors_tree.write())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"train": {}}', "no objects 'train' and 'test'"),
        (b'{"train": {}, "test": {"a": [{"cls_name": "a"}]}}', "an item without img_path"),
        ('{"train": {"é": []}, "test": {}}'.encode("latin-1"), "is not UTF-8 text"),
    ],
)
def test_malformed_metadata_raises_a_one_sentence_error(tmp_path, content, message):
    (tmp_path / "all_meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_benchmark("Polyp", tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_metadata(tmp_path):
    with pytest.raises(MissingFilesError, match=r"'Polyp' lacks .*all_meta\.json"):
        load_benchmark("Polyp", tmp_path)


# -- the loader "released" --


def test_released_draws_are_with_replacement_from_one_seed(authors_tree):
    """Four draws per sample, each repeated while it gives the target; `random.seed(42)` once for all samples."""
    for number in range(3):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    for number in range(5):
        authors_tree.add("test", "Polyp", "Polyp", f"test_{number}")
    root = authors_tree.write()
    rng = random.Random(42)
    expected = [[f"train_{rng.randrange(3)}.jpg" for _ in range(4)] for _ in range(5)]
    assert any(len(set(drawn)) < 3 for drawn in expected)
    samples = load_benchmark("Polyp", root, loader="released")
    assert [names(sample) for sample in samples] == expected
    assert names(samples[3]) == expected[3], "independent of earlier reads"
    assert [names(s) for s in load_benchmark("Polyp", root, limit=2, loader="released")] == expected[:2]
    rng = random.Random(7)
    first = [f"train_{rng.randrange(3)}.jpg" for _ in range(4)]
    assert names(load_benchmark("Polyp", root, seed=7, loader="released")[0]) == first
    default = load_benchmark("Polyp", root)[0]
    assert len(set(names(default))) == len(names(default)) == 3


@pytest.mark.parametrize(("others", "drawn"), [(0, 0), (1, 1), (2, 4), (3, 4)])
def test_released_draws_exclude_the_target(authors_tree, others, drawn):
    """Training samples refer to each other: a class of two images gives one reference, of three or more four."""
    for number in range(others + 1):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the class with a single image
        samples = load_benchmark("Polyp", authors_tree.write(), split="train", loader="released")
        for number, sample in enumerate(samples):
            assert len(names(sample)) == drawn and f"train_{number}.jpg" not in names(sample)


def test_released_listed_references_have_no_boxes(authors_tree):
    """The released loader does not read `ref_box`, so references have no boxes and there is no proxy query."""
    images = ["MGrounding-630k/1.jpg", "MGrounding-630k/2.jpg", "MGrounding-630k/3.jpg"]
    changes = {"img_path": images, "problem": "What is new?", "ref_box": [[0.1, 0.2, 0.5, 0.6]] * 2}
    authors_tree.add("train", "MGrounding", "Difference", "y", **changes)
    root = authors_tree.write()
    (default,) = load_benchmark("MGrounding", root, split="train")
    assert [reference.box is None for reference in default.references] == [False, False]
    (sample,) = load_benchmark("MGrounding", root, split="train", loader="released")
    resolved = resolve_references(sample.references)
    assert names(sample) == ["1.jpg", "2.jpg"]
    assert resolved.boxes == (None, None) and resolved.proxy is None


def test_released_masks_keep_their_gray_values(authors_tree):
    for number in range(3):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
    items = [authors_tree.add("test", "Polyp", "Polyp", f"test_{number}") for number in range(2)]
    root = authors_tree.write()
    gray = Image.open(root / items[0]["mask_path"]).resize(
        (24, 16), Image.Resampling.BICUBIC, (1.3, 1, 23, 15)
    )
    assert set(gray.tobytes()) - {0, 255}
    gray.save(root / items[0]["mask_path"])
    soft, hard = load_benchmark("Polyp", root, loader="released")
    assert soft.soft_mask.tobytes() == gray.tobytes() and hard.soft_mask is None
    assert soft.mask.tobytes() == load_benchmark("Polyp", root)[0].mask.tobytes()
    assert load_benchmark("Polyp", root)[0].soft_mask is None
    with pytest.raises(ValueError, match="loader is 'theirs'; use 'default' or 'released'"):
        load_benchmark("Polyp", root, loader="theirs")


@pytest.mark.parametrize("name", ["LVISRare", "LVISCommon", "iNaturalist", "SASilver_inaturalist"])
def test_dataset_names_of_the_released_loader(authors_tree, name):
    """The prompt is the class name without the dataset name, with underscores replaced by spaces."""
    for number in range(2):
        authors_tree.add("train", name, f"{name}_Abies_alba", f"a{number}")
    authors_tree.add("test", name, f"{name}_Abies_alba", "b")
    (sample,) = load_benchmark(name, authors_tree.write())
    assert (sample.prompt.strip(), sample.dataset, sample.level) == ("Abies alba", name, "CI")


def test_released_draws_repeat_a_single_image_four_times(authors_tree):
    authors_tree.add("train", "Polyp", "Polyp", "only")
    authors_tree.add("test", "Polyp", "Polyp", "test_0")
    (sample,) = load_benchmark("Polyp", authors_tree.write(), loader="released")
    assert names(sample) == ["only.jpg"] * 4
