"""The benchmark "photos": several datasets below one folder, and the real ones where they are available."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from real_photographs import REAL, needs_real_photographs
from trees import save_image, save_mask

from conceptseg_hf.cli import main
from conceptseg_hf.data import SMOKE_PHOTOS, MissingFilesError, load_benchmark
from conceptseg_hf.data.check import check_benchmark
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.references import resolve_references

COLUMNS = ("id", "image", "mask", "prompt", "references", "split", "level", "group")


def write_set(folder: Path, *rows: tuple[str, ...]) -> None:
    """Write a dataset; a row holds id, prompt, split, level, group and references."""
    folder.mkdir(parents=True)
    with (folder / "samples.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (name, prompt, split, level, group, references) in enumerate(rows):
            save_image(folder / f"images/{name}.jpg", seed=number)
            save_mask(folder / f"masks/{name}.png")
            fields = {
                "id": name,
                "image": f"images/{name}.jpg",
                "mask": f"masks/{name}.png",
                "prompt": prompt,
            }
            fields |= {"references": references, "split": split, "level": level, "group": group}
            writer.writerow(fields)


@pytest.fixture()
def root(tmp_path):
    crack, tile = ("crack", "CD", "industrial anomaly"), ("tile defect", "CD", "industrial anomaly")
    write_set(
        tmp_path / "cracks",
        *((f"train_{n}", crack[0], "train", *crack[1:], "") for n in range(6)),
        *((f"test_{n}", crack[0], "test", *crack[1:], "") for n in range(3)),
    )
    write_set(
        tmp_path / "tiles",
        *((f"train_{n}", tile[0], "train", *tile[1:], "") for n in range(2)),
        ("test_0", tile[0], "test", *tile[1:], ""),
        ("test_1", "the marked kind", "test", "CR", "consistency", "images/train_0.jpg|masks/train_0.png"),
        ("test_2", "dent", "test", *tile[1:], ""),
    )
    (tmp_path / "README.md").write_text("not a dataset")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_references_are_drawn_from_the_train_split_of_the_same_dataset_and_prompt(root):
    with pytest.warns(UserWarning, match="class 'tiles/dent' has no reference image"):
        samples = load_benchmark("photos", root)
    assert [sample.sample_id for sample in samples] == [
        "cracks/test_0",
        "tiles/test_0",
        "cracks/test_1",
        "tiles/test_1",
        "cracks/test_2",
        "tiles/test_2",
    ]
    assert [sample.dataset for sample in samples] == ["cracks", "tiles"] * 3
    drawn = {
        sample.sample_id: [Path(reference.image) for reference in sample.references] for sample in samples
    }
    for name, paths in drawn.items():
        assert all(path.parent.parent.name == name.split("/")[0] for path in paths)
        assert all(path.stem.startswith("train") for path in paths) and len(set(paths)) == len(paths)
    assert [len(paths) for paths in drawn.values()] == [4, 1, 4, 1, 4, 0]
    assert resolve_references(samples[3].references).boxes == ((4, 2, 12, 10),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, other = (load_benchmark("photos", root, seed=seed) for seed in (42, 7))
    assert again[0].references == samples[0].references
    assert any(a.references != b.references for a, b in zip(other, samples))


@pytest.mark.filterwarnings("ignore:photos")
def test_limit_covers_all_datasets_and_training_samples_are_not_their_own_reference(root):
    assert Counter(sample.dataset for sample in load_benchmark("photos", root, limit=4)) == {
        "cracks": 2,
        "tiles": 2,
    }
    for item, sample in zip((train := load_benchmark("photos", root, split="train")).items, train):
        assert item.image not in [reference.image for reference in sample.references]


@pytest.mark.filterwarnings("ignore:photos")
def test_report_has_a_row_per_dataset_and_group(root, model, processor):
    report = evaluate(model, "photos", root=root, processor=processor, router="sam_only")
    rows = {(row.group, row.dataset): row.samples for row in report.rows if row.kind == "data set"}
    assert rows == {
        ("industrial anomaly", "cracks"): 3,
        ("industrial anomaly", "tiles"): 2,
        ("consistency", "tiles"): 1,
    }
    table = report.to_markdown()
    assert "| cracks " in table and "industrial anomaly" in table


@pytest.mark.filterwarnings("ignore:photos")
def test_check_reads_all_splits(root, capsys):
    checks = check_benchmark("photos", root)
    assert [(check.split, check.found) for check in checks] == [("test", 6), ("train", 8)]
    (root / "cracks" / "masks" / "train_3.png").unlink()
    assert main(["data", "check", "photos", "--root", str(root)]) == 1
    assert "train_3.png" in capsys.readouterr().out


def test_refusals(root, tmp_path):
    with pytest.raises(ValueError, match=r"no split 'dev'; its rows are in 'test' \(6\), 'train' \(8\)"):
        load_benchmark("photos", root, split="dev")
    with pytest.raises(MissingFilesError, match=r"no subfolder with samples\.jsonl or samples\.csv"):
        load_benchmark("photos", root / "cracks")
    with (root / "cracks" / "samples.csv").open("a") as file:
        file.write("test_0,images/test_1.jpg,masks/test_1.png,crack,,test,CD,industrial anomaly\n")
    with pytest.raises(ValueError, match=r"cracks' has two samples with the id 'test_0'"):
        load_benchmark("photos", root)


def test_smoke_photos_can_be_used():
    samples = load_benchmark("plain", SMOKE_PHOTOS)
    assert len(samples) == 16 and len({item.image for item in samples.items}) == 7
    assert [sample.sample_id for sample in samples if not sample.present] == ["no-cat"]
    (check,) = check_benchmark("plain", SMOKE_PHOTOS)
    assert check.complete
    terms = (SMOKE_PHOTOS / "README.md").read_text(encoding="utf-8")
    assert all(f"| {item.image.name} |" in terms for item in samples.items)
    assert sum(path.stat().st_size for path in SMOKE_PHOTOS.rglob("*") if path.is_file()) < 2_000_000
    coins = next(sample for sample in samples if sample.sample_id == "coins")
    gray, mask = np.asarray(coins.image.convert("L")), np.asarray(coins.mask) > 0
    assert gray[mask].mean() > 1.5 * gray[~mask].mean()  # the masks lie on the coins


@needs_real_photographs
@pytest.mark.filterwarnings("ignore:photos")
def test_real_photographs():
    """Counts of the sets and groups, and the first samples of each set."""
    test, train = (load_benchmark("photos", REAL, split=split) for split in ("test", "train"))
    assert (len(test), len(train)) == (2042, 8554)
    groups = Counter(item.group for item in test.items)
    assert groups["medical lesion"] == 403 and groups["difference"] == 116 and len(groups) == 10
    assert len({item.dataset for item in test.items}) == 21
    for index in range(21):
        sample = test[index]
        mask = np.asarray(sample.mask) > 0
        assert mask.any() and mask.shape == sample.image.size[::-1] and not sample.reference_faults
        assert all(Path(reference.image) != test.items[index].image for reference in sample.references)
    targets = {item.image for item in test.items}
    assert not targets & {item.image for item in train.items}
