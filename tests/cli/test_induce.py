"""`conceptseg induce`, and concepts in `conceptseg segment`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conceptseg_hf import ConceptPrompt
from conceptseg_hf.cli import main
from conceptseg_hf.data import load_benchmark


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and masks of shadows, a concept that the embedded checkpoint knows."""
    folder = tmp_path_factory.mktemp("induce")
    samples = [s for s in load_benchmark("concept-shapes", split="test", limit=120) if s.family == "shadow"]
    for number, sample in enumerate(samples):
        sample.image.save(folder / f"{number}.png")
        sample.mask.save(folder / f"{number}_mask.png")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


REFERENCES = ["--reference", "0.png:0_mask.png", "--reference", "1.png:1_mask.png"]


def test_induce_and_apply(capsys):
    assert main(["induce", "--prompt", "shadow", *REFERENCES, "--out", "c.safetensors"]) == 0
    out = capsys.readouterr().out
    concept = ConceptPrompt.load("c.safetensors")
    assert "mean IoU" in out and out.endswith("c.safetensors\n") and concept.is_reliable
    assert main(["segment", "2.png", "--concept", "c.safetensors", "--output-dir", "out"]) == 0
    assert capsys.readouterr().out.startswith("concept: 'shadow'")
    record = json.loads(Path("out/2.json").read_text())
    assert (record["route"], record["prompt"], record["concept"]) == ("concept", "shadow", "c.safetensors")


def test_many_references(capsys):
    """The mask of the first one belongs to another image."""
    pairs = [("1.png", "0_mask.png"), *((f"{number}.png", f"{number}_mask.png") for number in range(5))]
    references = [word for image, mask in pairs for word in ("--reference", f"{image}:{mask}")]
    assert main(["induce", "--prompt", "shadow", *references, "--out", "many.safetensors"]) == 0
    useful = capsys.readouterr().out.partition("To reason with, references ")[2].partition(" are the most")[0]
    names = useful.replace(" and ", ", ").split(", ")
    assert len(names) == len(set(names)) == 4 and set(names) <= {f"{number}.png" for number in range(5)}


def test_a_rule_by_hand(capsys):
    rule = ["--rule", "the dark region", "--router", "full_reasoning", "--max-new-tokens", "40"]
    assert main(["segment", "2.png", "--prompt", "shadow", *rule, *REFERENCES, "--output-dir", "rule"]) == 0
    assert capsys.readouterr().out.startswith("rule: 'shadow'")
    record = json.loads(Path("rule/2.json").read_text())
    assert record["given_rule"] == record["rule"] == record["think"] == "the dark region"
    assert record["box"] is not None and record["check_iou"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["induce", "--prompt", " ", *REFERENCES, "--out", "x"], "--prompt is empty"),
        (["induce", "--prompt", "shadow", "--out", "x"], "there is no --reference"),
        (
            ["induce", "--prompt", "shadow", "--reference", "0.png", "--out", "x"],
            "reference 0 has neither a mask",
        ),
        (["induce", "--prompt", "shadow", *REFERENCES, "--out", "0.png/x"], "--out"),
        (["induce", "--prompt", "shadow", *REFERENCES, "--negative", "none.png", "--out", "x"], "'none.png'"),
        (["segment", "2.png", "--concept", "none.safetensors"], "concept 'none.safetensors' is not a file"),
        (["segment", "2.png", "--concept", "0.png"], "is not a concept"),
        (["segment", "2.png"], "--prompt is missing"),
        (["segment", "2.png", "--prompt", "shadow", "--rule", ""], "--rule is empty"),
        (["segment", "2.png", "--prompt", "shadow", "--rule", "</rule>"], "rule contains the tag '</rule>'"),
    ],
)
def test_bad_input_gives_one_sentence(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_concepts_of_other_weights_are_refused(capsys):
    ConceptPrompt("shadow", ("shadow",), score=0.9, model_hash="0" * 16).save("other.safetensors")
    assert main(["segment", "2.png", "--concept", "other.safetensors"]) == 2
    assert "made with other weights" in capsys.readouterr().err
