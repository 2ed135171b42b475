from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.evaluation.loading import load_model_and_processor
from conceptseg_hf.hub import is_hub_id, model_card, save_model_card, save_remote_stub

LOAD = """
import sys
import torchvision_shim
from transformers import AutoConfig, AutoModel, AutoProcessor
folder = sys.argv[1]
try:
    AutoModel.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("remote code ran without consent")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print()  # Transformers asks a question before it refuses
print(type(config).__name__, type(model).__name__, type(model).__module__, type(processor).__name__,
processor.canvas_size)
"""

LOAD_AFTER_IMPORT = """
import sys
import conceptseg_hf
from transformers import AutoModel, AutoProcessor, pipeline
pipe = pipeline("concept-segmentation", model=sys.argv[1], device="cpu")
print(type(pipe.model) is conceptseg_hf.ConceptSegForSegmentation, type(pipe.processor) is
conceptseg_hf.ConceptSegProcessor)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("stub")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_remote_stub(folder)
    return folder


def test_loads_with_trust_remote_code_and_without_import(checkpoint, fresh_python):
    expected = (
        "ConceptSegConfig ConceptSegForSegmentation conceptseg_hf.modeling_conceptseg ConceptSegProcessor 64"
    )
    assert fresh_python(LOAD, str(checkpoint)).splitlines()[-1] == expected


def test_after_the_import_the_stub_is_not_needed(checkpoint, fresh_python):
    assert fresh_python(LOAD_AFTER_IMPORT, str(checkpoint)) == "True True"


def test_files(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} and "custom_pipelines" not in config
    assert set(json.loads((checkpoint / "processor_config.json").read_text())["auto_map"]) == {
        "AutoProcessor"
    }
    before = {path: path.read_bytes() for path in checkpoint.glob("*.*")}
    save_remote_stub(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.glob("*.*")} == before


def test_needs_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        save_remote_stub(tmp_path)


# -- the model card --

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
    assert card.data.pipeline_tag == "image-segmentation" and card.data.library_name == "transformers"
    assert card.data.license is None and card.data.base_model is None  # random weights are nobody's
    assert "8 concept queries" in card.text and str(tmp_path) not in card.content
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_released_sam_brings_its_licence():
    config = ConceptSegConfig.from_preset("7b")
    by_name = model_card(config, ["zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3"])
    assert by_name.data.base_model == ["zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3"]
    by_size = model_card(config, ["/some/folder", "./sam3.pt"])  # no name of the Hub: a path is not published
    assert by_size.data.base_model is None and "/some/folder" not in by_size.content
    for card in (by_name, by_size):
        assert card.data.license == "other" and card.data.license_name == "sam-license"
        assert "facebook/sam3" in card.data.license_link and "SAM License" in card.text


@pytest.mark.parametrize(
    ("name", "is_id"), [("owner/name", True), ("a/b/c", False), ("./x", False), ("/a/b", False), ("x", False)]
)
def test_what_a_hub_id_is(name, is_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is is_id
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_a_report_goes_into_the_card(model, report_folder, tmp_path):
    path = save_model_card(tmp_path, model.config, report=report_folder)
    card = ModelCard.load(path)
    assert "| all | 0.500 |" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["foreground IoU"].metric_value == 0.5 and results["miou"].metric_value == 71.0
    assert "mae" not in results and results["miou"].dataset_name == "concept-shapes"
    in_memory = SimpleNamespace(to_dict=lambda: REPORT, to_markdown=lambda: "numbers")
    assert "numbers" in model_card(model.config, report=in_memory).text


def test_a_report_that_is_none(model, tmp_path):
    with pytest.raises(ValueError, match="conceptseg evaluate"):
        save_model_card(tmp_path, model.config, report=tmp_path / "nothing")


@pytest.fixture()
def uploads(monkeypatch):
    """What the Hub would be sent; itself it cannot be reached from a test."""
    sent = []

    def upload_folder(self, **arguments):
        folder = arguments["folder_path"]
        card = ModelCard.load(f"{folder}/README.md")
        sent.append({**arguments, "card": card, "model": AutoModel.from_pretrained(folder)})
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, name, **_: repo_id == "me/old")
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


def test_push_sends_model_and_card(model, uploads, report_folder):
    assert model.push_to_hub("new") == "commit"
    assert uploads[0]["repo_id"] == "me/new" and uploads[0]["ignore_patterns"] is None
    loaded = uploads[0]["model"]
    assert type(loaded) is ConceptSegForSegmentation and torch.equal(loaded.ctm.queries, model.ctm.queries)
    model.push_to_hub("old", commit_message="again")
    assert uploads[1]["ignore_patterns"] == ["README.md"] and uploads[1]["commit_message"] == "again"
    model.push_to_hub("old", report=report_folder)
    assert uploads[2]["ignore_patterns"] is None and uploads[2]["card"].data.eval_results


def test_saving_may_push(model, uploads, tmp_path):
    model.save_pretrained(tmp_path / "name", push_to_hub=True)
    model.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="other", private=True)
    assert [upload["repo_id"] for upload in uploads] == ["me/name", "me/other"]


# -- checkpoints in the authors' layout --


@pytest.mark.parametrize(
    "load",
    [
        ConceptSegForSegmentation.from_pretrained,
        ConceptSegConfig.from_pretrained,
        ConceptSegProcessor.from_pretrained,
        load_model_and_processor,
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2_5_vl", "architectures": ["ConceptSegR1ForConditionalGeneration_qwen2p5"]},
        {"model_type": "qwen2_vl", "num_of_query": 8},
    ],
)
def test_the_authors_layout_is_told_how_to_load(tmp_path, load, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in the authors' layout; make one that loads") as error:
        load(tmp_path)
    assert f"conceptseg convert --checkpoint {tmp_path} --sam facebook/sam3 --out DIR" in str(error.value)
