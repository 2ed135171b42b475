"""The scripts for the benchmark "photos": baselines, U-Net and table."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.evaluation.records.runs import read_runs

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore:photos")


@pytest.fixture(scope="module")
def script():
    """Imports a script of benchmarks/."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Bright objects, dark objects, and changes beside pictures without them; always at the same place."""
    folder = tmp_path_factory.mktemp("photos")
    for name, group, prompt, color in (
        ("bright", "saliency", "lamp", 230),
        ("dark", "saliency", "hole", 20),
        ("changes", "difference", "what is new", 230),
    ):
        (folder / name).mkdir()
        rng = np.random.default_rng(0)
        with (folder / name / "samples.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "image", "mask", "prompt", "references", "split", "level", "group"))
            for number in range(6):
                split = "test" if number >= 4 else "train"
                before = np.clip(rng.normal(120, 10, (48, 64)), 0, 255).astype(np.uint8)
                image, mask = before.copy(), np.zeros((48, 64), np.uint8)
                image[15:31, 20:44], mask[15:31, 20:44] = color, 255
                for stem, pixels in (("image", image), ("mask", mask), ("before", before)):
                    Image.fromarray(pixels).save(folder / name / f"{stem}_{number}.png")
                listed = f"before_{number}.png" if group == "difference" else ""
                files = f"image_{number}.png", f"mask_{number}.png"
                writer.writerow((number, *files, prompt, listed, split, "CD", group))
    return folder


def ious(folder: Path) -> dict[str, float]:
    (run,) = read_runs(folder).values()
    return {record["sample_id"]: record["foreground_iou"] for record in run.records.values()}


def test_baselines(script, root, tmp_path, capsys):
    pytest.importorskip("cv2")
    script("photos_baselines").main(["--root", str(root), "--output-dir", str(tmp_path)])
    found = {path.name: ious(path) for path in tmp_path.iterdir()}
    assert set(found) == {
        "all",
        "prior",
        "otsu",
        "saliency",
        "grabcut-center",
        "grabcut-saliency",
        "difference",
    }
    assert set(found["all"].values()) == {16 * 24 / (48 * 64)}
    assert min(found["otsu"].values()) > 0.95  # each dataset with its own polarity
    assert min(found["prior"].values()) > 0.8
    assert set(found["difference"]) == {"changes/4", "changes/5"} and min(found["difference"].values()) > 0.7
    assert min(found["grabcut-center"].values()) > 0.9

    capsys.readouterr()
    evaluations = [f"{name}={tmp_path / name}" for name in ("all", "difference")]
    script("photos_table").main(evaluations)
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1:-1] == ["level", "dataset", "samples", "all", "difference"]
    assert [line[2:5] for line in lines[2:]] == [
        [name, "2", "0.125 [0.125, 0.125]"] for name in ("bright", "changes", "dark")
    ]
    assert lines[2][5] == "-" and lines[3][5] != "-"


def test_unet_learns_and_its_state_can_be_restored(script, root, tmp_path):
    unet = script("photos_unet")
    data = unet.TrainingData(load_benchmark("photos", root, "train"), side=32, seed=0)
    first, again, other = data.batch(0, 4), data.batch(0, 4), data.batch(1, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 3, 32, 32) and first[1].min() >= 0 and first[1].max() == 1
    assert data.prompts == {"hole": 1, "lamp": 2, "what is new": 3}

    torch.manual_seed(0)
    model = unet.UNet(4, width=8, levels=2, prompt_width=8)
    training = unet.Training(model, {"side": 32}, tmp_path / "state.safetensors")
    losses = []
    for step in range(40):
        images, masks, prompts = data.batch(step, 4)
        loss = unet.dice_loss(model(images, prompts), masks)
        training.update(loss, 3e-3)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert model.films[-1].linear.weight.abs().sum() > 0  # the prompt is used
    training.seconds = 12.5
    training.save()

    restored = unet.Training(unet.UNet(4, 8, 2, 8), {"side": 32}, training.path)
    assert (restored.step, restored.seconds) == (40, 12.5)
    for each in (training, restored):
        each.model.train()
        images, masks, prompts = data.batch(40, 4)
        each.update(unet.dice_loss(each.model(images, prompts), masks), 3e-3)
    states = training.model.state_dict(), restored.model.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(SystemExit, match="other settings"):
        unet.Training(unet.UNet(4, 8, 2, 8), {"side": 64}, training.path)


def test_unet_command(script, root, tmp_path, capsys):
    options = [
        "--side",
        "32",
        "--width",
        "4",
        "--levels",
        "2",
        "--cpu-seconds",
        "0",
        "--output-dir",
        str(tmp_path),
    ]
    script("photos_unet").main(["--root", str(root), *options])
    assert "12 training samples, 3 prompts" in capsys.readouterr().out
    assert len(ious(tmp_path / "evaluation")) == 6


def test_learning_rate(script):
    rate_at = script("photos_unet").rate_at
    assert rate_at(0, 1.0) == pytest.approx(0.01) and rate_at(0.02, 1.0) == pytest.approx(1)
    assert rate_at(0.51, 1.0) == pytest.approx(0.5) and rate_at(1.0, 1.0) == pytest.approx(0)


def write_tiles(source: Path, tested: Collection[int] = ()) -> None:
    """Write three exposures of eight tiles; the first exposure of tested tiles is in the test split."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (source / folder).mkdir(parents=True)
    with (source / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "image", "mask", "prompt", "split", "level", "group"))
        for tile in range(8):
            for exposure in range(3):
                stem = f"crack-exp{exposure}_num_{5000 * tile + 40 * exposure}"
                noise = np.kron(rng.integers(0, 256, (8, 8)), np.ones((8, 8))).astype(np.uint8)
                Image.fromarray(noise).save(source / "images" / f"{stem}.jpg")
                Image.new("L", (64, 64), 255).save(source / "masks" / f"{stem}.png")
                split = "test" if exposure == 0 and tile in tested else "train"
                files = f"images/{stem}.jpg", f"masks/{stem}.png"
                writer.writerow((stem, *files, "crack", split, "CD", "industrial anomaly"))


def tiles_of(folder: Path, split: str) -> list[int]:
    items = load_benchmark("plain", folder, split).items
    return [int(item.sample_id.split("_")[-1]) // 5000 for item in items]


def test_magnetic_tile_split_leaves_out_what_mini_has_seen(script, tmp_path, capsys):
    source = tmp_path / "photos" / "magnetic-tile"
    write_tiles(source, tested=(1, 2, 4, 6))
    script("magnetic_tile").main([str(source), str(tmp_path / "target"), "--unseen"])
    assert "4 groups, 1 held out: 9 training and 3 held-out images" in capsys.readouterr().out
    parts = [tiles_of(tmp_path / "target", split) for split in ("train", "test")]
    assert {*parts[0], *parts[1]} == {1, 2, 4, 6} and not set(parts[0]) & set(parts[1])


def test_magnetic_tile_split_separates_tiles(script, tmp_path, capsys):
    module = script("magnetic_tile")
    assert module.groups_of([5000, 10, 40, 2000, 3200, 4600]) == [2, 0, 0, 1, 1, 2]
    source = tmp_path / "source"
    write_tiles(source)
    module.main([str(source), str(tmp_path / "target")])
    assert "8 groups, 2 held out: 18 training and 6 held-out images" in capsys.readouterr().out
    tiles = [set(tiles_of(tmp_path / "target", split)) for split in ("train", "test")]
    assert [len(each) for each in tiles] == [6, 2] and not tiles[0] & tiles[1]
    (source / "samples.csv").write_text(
        "id,image,mask,prompt,split\na,images/a.jpg,masks/a.png,crack,train\n"
    )
    with pytest.raises(SystemExit):
        module.main([str(source), str(tmp_path / "other")])
    assert "has other file names" in capsys.readouterr().err
