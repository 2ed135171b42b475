"""examples/finetune_on_your_data.py from a folder to files that `conceptseg segment` applies."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("trl", "1.16")
pytest.importorskip("peft")

from conceptseg_hf.cli import main as command
from conceptseg_hf.data import load_benchmark

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_on_your_data.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_on_your_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture()
def root(tmp_path):
    """Shadows: eight for training, three held out, and a held-out copy of a training image."""
    samples = load_benchmark("concept-shapes", split="test", limit=400)
    shadows = [sample for sample in samples if sample.family == "shadow"][:11]
    rows = [
        *((sample, "train" if n < 8 else "test") for n, sample in enumerate(shadows)),
        (shadows[0], "test"),
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "samples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "prompt", "split"))
        for number, (sample, split) in enumerate(rows):
            sample.image.save(folder / f"{number}.png")
            sample.mask.save(folder / f"{number}_mask.png")
            writer.writerow((f"{number}.png", f"{number}_mask.png", "star", split))
    return folder


@pytest.mark.heavy
def test_methods_are_compared_and_their_files_can_be_applied(example, root, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--root",
        str(root),
        "--images",
        "4,100",
        "--steps",
        "40",
        "--ctm-steps",
        "1",
        "--output-dir",
        str(out),
    ]
    example.main([*options, "--methods", "tokens,lora"])
    output = capsys.readouterr().out
    assert "8 training images, 4 held-out images, 1 of these are duplicates" in output
    example.main([*options, "--methods", "tokens,lora,ctm"])  # uses what there is
    lines = [line.split("|")[1:-1] for line in (out / "table.md").read_text().splitlines()[2:]]
    rows = {(line[0].strip(), line[1].strip()): float(line[2].split()[0]) for line in lines}
    assert set(rows) == {
        ("SAM 3 on the words", "-"),
        ("full reasoning, 4 references", "-"),
        *((name, count) for name in ("tokens", "lora", "ctm", "ctm as concept") for count in ("4", "8")),
    }
    assert rows["SAM 3 on the words", "-"] < 0.1 and rows["tokens", "8"] > 0.6
    minutes = json.loads((out / "tokens-8" / "minutes.json").read_text())
    assert f"{minutes:.2f}" == lines[3][4].strip()
    assert Image.open(out / "held_out.png").size == (8 * example.SIDE, 3 * example.SIDE + example.HEADING)

    image, mask = str(root / "9.png"), tmp_path / "segmented" / "9_mask.png"
    for arguments in (
        ["--concept", str(out / "tokens-8/concept.safetensors"), "--router", "sam_only"],
        [
            "--concept",
            str(out / "lora-8/concept.safetensors"),
            "--model",
            str(out / "lora-8"),
            "--router",
            "sam_only",
        ],
        [
            "--concept",
            str(out / "ctm-8/concept.safetensors"),
            "--model",
            str(out / "ctm-8"),
            "--router",
            "sam_only",
        ],
    ):
        assert command(["segment", image, *arguments, "--output-dir", str(mask.parent)]) == 0
        assert Image.open(mask).size == Image.open(image).size
        mask.unlink()


def test_refusals(example, root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main(["--root", str(root), "--methods", "tokens,prompt"])
    assert "no method is named 'prompt'" in capsys.readouterr().err
    text = (root / "samples.csv").read_text()
    (root / "samples.csv").write_text(text.replace("1.png,1_mask.png,star", "1.png,1_mask.png,moon"))
    with pytest.raises(SystemExit, match="has 2 prompts; use one folder per concept"):
        example.main(["--root", str(root), "--output-dir", str(tmp_path / "out")])
