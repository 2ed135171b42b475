from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers.pipelines import PIPELINE_REGISTRY

from conceptseg_hf import ConceptSegConfig
from conceptseg_hf.cards import is_hub_id, merge_cards, model_card, save_model_card

REPORT = {
    "settings": {"benchmark": "concept-shapes", "split": "test", "protocol": "standard"},
    "table": [
        {"level": "CI", "group": "all", "foreground_iou": 0.9, "masks": {"miou": 91.0}},
        {"level": "all", "group": "all", "foreground_iou": 0.5, "masks": {"miou": 71.0, "mae": None}},
    ],
}


@pytest.fixture()
def report_folder(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "report.md").write_text("| level | fg IoU |\n|---|---|\n| all | 0.500 |\n")
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


def test_saving_writes_a_card_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None and card.data.library_name == "conceptseg-hf"
    assert {"concept-segmentation", "conceptseg"} == set(card.data.tags)
    assert card.data.license is None and card.data.base_model is None  # random weights have no license
    assert "8 concept queries" in card.text and str(tmp_path) not in card.content
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_card_of_released_sam_has_the_sam_license():
    config = ConceptSegConfig.from_preset("7b")
    by_name = model_card(config, ["zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3"])
    assert by_name.data.base_model == ["zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3"]
    by_size = model_card(config, ["/some/folder", "./sam3.pt"])  # local paths are not published
    assert by_size.data.base_model is None and "/some/folder" not in by_size.content
    for card in (by_name, by_size):
        assert card.data.license == "other" and card.data.license_name == "sam-license"
        assert "facebook/sam3" in card.data.license_link and "SAM License" in card.text


@pytest.mark.parametrize(
    ("name", "is_id"), [("owner/name", True), ("a/b/c", False), ("./x", False), ("/a/b", False), ("x", False)]
)
def test_is_hub_id(name, is_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is is_id
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_card_contains_the_evaluation_report(model, report_folder, tmp_path):
    path = save_model_card(tmp_path, model.config, report=report_folder)
    card = ModelCard.load(path)
    assert "| all | 0.500 |" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["foreground IoU"].metric_value == 0.5 and results["miou"].metric_value == 71.0
    assert "mae" not in results and results["miou"].dataset_name == "concept-shapes"
    in_memory = SimpleNamespace(to_dict=lambda: REPORT, to_markdown=lambda: "numbers")
    assert "numbers" in model_card(model.config, report=in_memory).text


def test_unreadable_report_raises(model, tmp_path):
    with pytest.raises(ValueError, match="conceptseg evaluate"):
        save_model_card(tmp_path, model.config, report=tmp_path / "missing")


def test_card_does_not_trigger_a_transformers_snippet_on_the_hub(model):
    """The Hub generates its code snippet from `library_name` and `pipeline_tag`."""
    data = model_card(model.config).data
    assert data.library_name != "transformers" and data.pipeline_tag not in PIPELINE_REGISTRY.supported_tasks


# -- existing cards --

SAM = "---\nlicense: other\nlicense_name: sam-license\nbase_model: [facebook/sam3]\ntags: [a]\n---\n\nours\n"
TRL = """---
base_model: None
library_name: transformers
model_name: run
tags: [trl, grpo]
licence: license
datasets: me/data
---

# Model Card for run

This model is a fine-tuned version of [None](https://huggingface.co/None).
It has been trained using [TRL](https://github.com/huggingface/trl).
"""
TRAINER = """---
library_name: transformers
license: apache-2.0
tags: [generated_from_trainer]
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run
"""


@pytest.mark.parametrize(
    ("existing", "metadata"),
    [
        (TRL, {"datasets": "me/data", "tags": ["a", "trl", "grpo", "b"]}),
        (TRAINER, {"tags": ["a", "generated_from_trainer", "b"]}),
        ("---\nlicense: mit\nlanguage: en\n---\n", {"language": "en", "tags": ["a", "b"]}),
        ("", {"tags": ["a", "b"]}),
    ],
)
def test_generated_or_empty_card_is_replaced(existing, metadata):
    card = ModelCard(merge_cards(existing, SAM, ["b"]))
    assert card.text.strip() == "ours"
    sam = {"license": "other", "license_name": "sam-license", "base_model": ["facebook/sam3"]}
    assert card.data.to_dict() == sam | metadata


def test_metadata_of_an_empty_card_is_kept():
    card = ModelCard(
        merge_cards("---\nlicense: mit\npipeline_tag: mask-generation\n---\n", "---\ntags: [a]\n---\nours\n")
    )
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "mask-generation")
    assert card.text.strip() == "ours"


@pytest.mark.parametrize("metadata", ["---\nmodel_name: M\ntags: [x]\n---\n", ""])
def test_custom_card_keeps_its_text_and_gets_the_license(metadata):
    merged = merge_cards(f"{metadata}\n# Mine\n\n- by hand\n", SAM)
    card = ModelCard(merged)
    assert card.text == "\n# Mine\n\n- by hand\n"
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")
    assert card.data.base_model == ["facebook/sam3"]
    assert card.data.get("model_name") == ("M" if metadata else None)
    assert card.data.tags == (["x"] if metadata else None)
    assert merge_cards(merged, SAM) == merged


def test_different_license_is_kept_with_a_warning(caplog):
    existing = "---\nlicense: mit\nbase_model: me/base # a comment\n---\n# Mine"
    assert merge_cards(existing, SAM) == existing
    assert "'mit'" in caplog.text and "SAM License" in caplog.text
    assert "license: mit" in merge_cards(existing, SAM, ["b"])


def test_card_with_invalid_metadata_is_kept_unchanged(caplog):
    existing = "---\n[: {\n---\n# Mine"
    assert merge_cards(existing, SAM) == existing and "cannot be read" in caplog.text


def test_card_describes_the_training(model, tmp_path):
    save_model_card(
        tmp_path, model.config, ["me/base"], tags=["trl"], training="By hand.", datasets=["me/data"]
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Training\n\nBy hand." in card.text and "[me/base]" in card.text
    assert card.data.datasets == ["me/data"] and "trl" in card.data.tags
