"""`conceptseg info FILE`: a concept file, and files that are none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hostile_concepts import hostile_files
from PIL import Image

from conceptseg_hf import ConceptPrompt, nano_checkpoint
from conceptseg_hf.cli import main
from conceptseg_hf.concept_prompt import CandidateScore, concept_hash
from conceptseg_hf.loading import load_model_and_processor


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def show(capsys, *arguments: str) -> dict[str, str]:
    assert main(["info", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[:-1]]
    return dict(rows) | {"": lines[-1]}


def test_concept(capsys):
    model, _ = load_model_and_processor()
    width = model.config.ctm_config.sam_hidden_size
    scores = (CandidateScore("red star", 0.8, (0.9, 0.7)), CandidateScore("star", 0.4, (0.5, 0.3)))
    ConceptPrompt(
        "the odd\none",
        ("red star", "blue\x1b[2J star"),
        "find red",
        torch.zeros(4, width),
        0.25,
        0.8,
        scores,
        concept_hash(model),
        0.75,
    ).save("c.safetensors")
    rows = show(capsys, "c.safetensors")
    assert rows["prompt"] == "the odd\\none" and rows["rule"] == "find red"
    assert rows["phrase 0"] == "red star" and rows["phrase 1"] == "blue\\x1b[2J star"
    assert rows["tokens"] == f"4 of width {width}" and rows["threshold"] == "0.250"
    assert (rows["score"], rows["of reasoning"]) == ("0.800", "0.750")
    assert rows["red star"] == "0.800 (per reference: 0.90, 0.70)"
    assert rows["weights"] == f"{concept_hash(model)} (those of {nano_checkpoint()})"
    assert rows[""].endswith("explains the references with a mean IoU of 0.80.")


def test_concept_of_other_weights_and_another_checkpoint(capsys, checkpoint):
    ConceptPrompt("x", ("x",), model_hash="0" * 16).save("c")
    rows = show(capsys, "c")
    assert rows["weights"] == f"{'0' * 16} (not those of {nano_checkpoint()})"
    assert (rows["score"], rows["rule"], rows["tokens"]) == ("not verified", "none", "none")
    model, _ = load_model_and_processor(checkpoint)
    ConceptPrompt("x", ("x",), model_hash=concept_hash(model)).save("c")
    assert show(capsys, "c", "--model", checkpoint)["weights"].endswith(f"(those of {checkpoint})")


@pytest.mark.parametrize("subcommand", ["info", "batch"])
@pytest.mark.parametrize("name", hostile_files())
def test_hostile_files_give_one_sentence(name, subcommand, capsys):
    if subcommand == "batch":
        pytest.importorskip("pyarrow", reason="batch jobs need pyarrow")
    Path("c.safetensors").write_bytes(hostile_files()[name])
    options = {
        "info": ["c.safetensors"],
        "batch": ["--images", ".", "--out", "out", "--concept", "c.safetensors"],
    }
    Path("a.png").touch()
    assert main([subcommand, *options[subcommand]]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"conceptseg {subcommand}: ") and error.count("\n") == 1
    assert "c.safetensors" in error and len(error) < 450


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "device", "broken link", "name of 5000 letters", "null byte"]
)
def test_what_is_no_file_gives_one_sentence(kind, capsys):
    name = {
        "missing": "none.safetensors",
        "folder": "d.safetensors",
        "device": "/dev/null",
        "broken link": "link.safetensors",
        "name of 5000 letters": "x" * 5000,
        "null byte": "a\0b",
    }[kind]
    Path("d.safetensors").mkdir()
    Path("link.safetensors").symlink_to("nowhere")
    assert main(["info", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tokens_of_another_width_are_refused(capsys):
    """The hash of the weights may be missing, as in a file that was written by hand."""
    ConceptPrompt("x", ("x",), concept_embeds=torch.zeros(2, 3)).save("c.safetensors")
    Image.new("RGB", (40, 40)).save("a.png")
    assert main(["segment", "a.png", "--concept", "c.safetensors", "--router", "sam_only"]) == 2
    error = capsys.readouterr().err
    assert "has tokens of width 3, but SAM 3 of this model has width" in error and error.count("\n") == 1
