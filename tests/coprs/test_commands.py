"""The command and the evaluation with a CoPRS checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from random_coprs import save_random_coprs

from conceptseg_hf import visualization
from conceptseg_hf.cli import main
from conceptseg_hf.evaluation import evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model whose only token is <REF_POS>."""
    folder = tmp_path_factory.mktemp("coprs")
    save_random_coprs(folder)
    return folder


def test_segment_writes_the_heatmap(checkpoint, make_image, tmp_path, capsys) -> None:
    make_image(0).save(tmp_path / "photo.png")
    arguments = ["segment", str(tmp_path / "photo.png"), "--prompt", "red circle", "--model", str(checkpoint)]
    assert main([*arguments, "--heatmap", "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("reasoning: 'red circle', score") and "presence" not in printed
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert record["heatmap"] == "photo_heatmap.png" and record["route"] == "reasoning"
    heatmap = Image.open(tmp_path / "out" / "photo_heatmap.png")
    assert heatmap.mode == "L" and heatmap.size == (90, 60)
    assert main([*arguments, "--output-dir", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "photo_heatmap.png").exists()


def test_sam_only_is_refused_in_one_sentence(checkpoint, make_image, tmp_path, capsys) -> None:
    make_image(0).save(tmp_path / "photo.png")
    options = [
        "--prompt",
        "star",
        "--model",
        str(checkpoint),
        "--router",
        "sam_only",
        "--output-dir",
        str(tmp_path),
    ]
    assert main(["segment", str(tmp_path / "photo.png"), *options]) == 2
    assert "CoPRS always reasons" in capsys.readouterr().err


def test_evaluation_runs_and_resumes(checkpoint, tmp_path) -> None:
    options = {"limit": 2, "output_dir": tmp_path, "batch_size": 2}
    report = evaluate(str(checkpoint), "concept-shapes", **options)
    assert [record["error"] for record in report.records] == [None, None]
    assert [record["route"] for record in report.records] == ["reasoning", "reasoning"]
    again = evaluate(str(checkpoint), "concept-shapes", **options)
    assert again.to_markdown() == report.to_markdown()


def test_the_demo_shows_the_prior(checkpoint, tmp_path, capsys, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        visualization, "heatmap_overlay", lambda image, heatmap: drawn.append(heatmap) or image
    )
    assert main(["demo", "--model", str(checkpoint), "--samples", "2", "--output-dir", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "results.json").read_text())
    assert len(records) == 4 == len(drawn)  # two drawings and two photographs
    assert all(record["prior"]["iou"] >= 0 and record["format_valid"] is False for record in records)


def test_heatmap_overlay_colors() -> None:
    from conceptseg_hf.visualization import heatmap_overlay

    image = Image.new("RGB", (3, 1))
    drawn = np.asarray(heatmap_overlay(image, np.array([[0.0, 0.5, 1.0]]), opacity=1.0))
    assert drawn[0].tolist() == [[13, 8, 60], [180, 68, 90], [252, 245, 170]]
    with pytest.raises(ValueError, match="the heatmap has the size"):
        heatmap_overlay(image, np.zeros((2, 2)))


def test_settings_of_conceptseg_are_refused_in_one_sentence(checkpoint, make_image, tmp_path, capsys) -> None:
    image = tmp_path / "photo.png"
    make_image(0).save(image)
    common = ["--prompt", "star", "--model", str(checkpoint)]
    output = ["--output-dir", str(tmp_path / "out")]
    for arguments, message in (
        (
            ["segment", str(image), *common, *output, "--profile", "released"],
            "profiles are settings of ConceptSeg",
        ),
        (
            ["segment", str(image), *common, *output, "--rule", "the red one"],
            "rule is an option of ConceptSeg",
        ),
        (["segment", str(image), *common, *output, "--vlm-engine", "vllm"], "CoPRS supports only"),
        (
            [
                "induce",
                *common,
                "--reference",
                f"{image}:2,2,40,40",
                "--out",
                str(tmp_path / "x.safetensors"),
            ],
            "applies no concepts",
        ),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
