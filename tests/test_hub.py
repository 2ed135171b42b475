from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import AutoModel, AutoProcessor

from conceptseg_hf import (
    ConceptSegConfig,
    ConceptSegForSegmentation,
    ConceptSegmentationPipeline,
    ConceptSegProcessor,
)
from conceptseg_hf.hub import save_remote_stub
from conceptseg_hf.loading import load_model_and_processor

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
print()  # ends the line of the prompt that Transformers prints before it raises
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


def test_stub_is_not_used_after_importing_the_package(checkpoint, fresh_python):
    assert fresh_python(LOAD_AFTER_IMPORT, str(checkpoint)) == "True True"


def test_stub_files(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} and "custom_pipelines" not in config
    assert set(json.loads((checkpoint / "processor_config.json").read_text())["auto_map"]) == {
        "AutoProcessor"
    }
    before = {path: path.read_bytes() for path in checkpoint.glob("*.*")}
    save_remote_stub(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.glob("*.*")} == before


def test_save_remote_stub_requires_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        save_remote_stub(tmp_path)


@pytest.mark.parametrize("first", ["model", "processor"])
def test_stub_is_kept_when_the_checkpoint_is_saved_again(checkpoint, fresh_python, tmp_path, first):
    """A checkpoint with an `auto_map` but without the stub could not be loaded."""
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    for part in (model, processor) if first == "model" else (processor, model):
        part.save_pretrained(tmp_path / "again")
    assert fresh_python(LOAD, str(tmp_path / "again")).splitlines()[-1].startswith("ConceptSegConfig")


def test_saving_does_not_add_a_stub(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "conceptseg_stub.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


# -- uploads --

TEMPLATE = ModelCard.from_template(
    ModelCardData(tags=["mine"], library_name="transformers"),
    model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model "
    "card has been automatically generated.",
)


@pytest.fixture()
def report_folder(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "report.md").write_text("| level | fg IoU |\n|---|---|\n| all | 0.500 |\n")
    content = {
        "settings": {"benchmark": "concept-shapes", "split": "test", "protocol": "standard"},
        "table": [{"level": "all", "group": "all", "foreground_iou": 0.5, "masks": {"miou": 71.0}}],
    }
    (folder / "report.json").write_text(json.dumps(content))
    return folder


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    """An in-memory Hub with the files of each repository and the arguments of the uploads."""
    repositories, uploads, branches = {}, [], []

    def create_repo(self, name, **_):
        repo_id = name if "/" in name else f"me/{name}"
        repositories.setdefault(repo_id, {})
        return SimpleNamespace(repo_id=repo_id)

    def hf_hub_download(self, repo_id, name, **_):
        path = tmp_path / "cache"
        path.write_bytes(repositories[repo_id][name])
        return str(path)

    def upload_folder(self, repo_id, folder_path, ignore_patterns, **arguments):
        uploads.append(arguments)
        for path in sorted(Path(folder_path).rglob("*")):
            if path.is_file() and path.name not in (ignore_patterns or ()):
                repositories[repo_id][str(path.relative_to(folder_path))] = path.read_bytes()
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, name, **_: name in repositories[repo_id])
    monkeypatch.setattr(HfApi, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, branch, **_: branches.append(branch))
    return SimpleNamespace(repositories=repositories, uploads=uploads, branches=branches)


def card_of(hub, repo_id) -> ModelCard:
    return ModelCard(hub.repositories[repo_id]["README.md"].decode())


def test_push_to_hub_uploads_model_and_card(model, hub, tmp_path, report_folder):
    assert model.push_to_hub("new") == "commit"
    for name, content in hub.repositories["me/new"].items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ConceptSegForSegmentation and torch.equal(loaded.ctm.queries, model.ctm.queries)
    assert card_of(hub, "me/new").text == ModelCard.load(tmp_path / "README.md").text
    model.push_to_hub("new", report=report_folder)
    assert card_of(hub, "me/new").data.eval_results


def test_push_to_hub_accepts_the_standard_arguments(model, processor, hub):
    pipe = ConceptSegmentationPipeline(model=model, processor=processor)
    for number, part in enumerate((model, processor, pipe)):
        part.push_to_hub(
            f"repo-{number}",
            commit_message="first",
            commit_description="why",
            tags=["mine", "yours"],
            private=True,
            token="hf_x",
            revision="branch",
            create_pr=True,
            max_shard_size="2MB",
        )
        expected = {
            "commit_message": "first",
            "commit_description": "why",
            "revision": "branch",
            "create_pr": True,
        }
        assert hub.uploads[-1] == expected and hub.branches[-1] == "branch"
        assert {"mine", "yours"} <= set(card_of(hub, f"me/repo-{number}").data.tags)
    files = hub.repositories["me/repo-2"]
    assert {"config.json", "processor_config.json", "model.safetensors.index.json"} <= set(files)
    model.push_to_hub("repo-0", tags="single")
    assert card_of(hub, "me/repo-0").data.tags[-1] == "single"


def test_save_pretrained_with_push_to_hub(model, processor, hub, tmp_path):
    pipe = ConceptSegmentationPipeline(model=model, processor=processor)
    for part in (model, processor, pipe):
        name = type(part).__name__
        part.save_pretrained(tmp_path / name, push_to_hub=True)
        part.save_pretrained(
            tmp_path / name, push_to_hub=True, repo_id=f"you/{name}", private=True, commit_description="why"
        )
        assert hub.repositories[f"me/{name}"] == hub.repositories[f"you/{name}"]
        assert hub.uploads[-1]["commit_description"] == "why"
    assert set(hub.repositories["me/ConceptSegmentationPipeline"]) == {
        *hub.repositories["me/ConceptSegForSegmentation"],
        *hub.repositories["me/ConceptSegProcessor"],
    }


@pytest.mark.parametrize("order", ["processor first", "model first", "pipeline"])
def test_push_order_does_not_affect_the_card(model, processor, hub, order):
    pipe = ConceptSegmentationPipeline(model=model, processor=processor)
    parts = {
        "processor first": (processor, model),
        "model first": (model, processor),
        "pipeline": (pipe, pipe),
    }
    for part in parts[order]:
        part.push_to_hub("repo")
    card = card_of(hub, "me/repo")
    assert card.text.startswith("\n# ConceptSeg checkpoint") and card.data.library_name == "conceptseg-hf"


@pytest.mark.parametrize("push", ["model", "pipeline", "save"])
def test_generated_card_on_the_hub_is_replaced(model, processor, hub, tmp_path, push):
    hub.repositories["me/repo"] = {"README.md": str(TEMPLATE).encode()}
    if push == "model":
        model.push_to_hub("repo")
    elif push == "pipeline":
        ConceptSegmentationPipeline(model=model, processor=processor).push_to_hub("repo")
    else:
        model.save_pretrained(tmp_path / "repo", push_to_hub=True)
    card = card_of(hub, "me/repo")
    assert "# ConceptSeg checkpoint" in card.text and "mine" in card.data.tags
    assert card.data.library_name == "conceptseg-hf"


def test_custom_card_on_the_hub_is_kept(model, hub, monkeypatch):
    written = "---\ntags: [mine]\n---\n\nMy model.\n"
    hub.repositories["me/repo"] = {"README.md": written.encode()}
    model.push_to_hub("repo")
    assert hub.repositories["me/repo"]["README.md"].decode() == written

    def released(*_):  # simulates a checkpoint with the released SAM 3 weights
        return True

    monkeypatch.setattr("conceptseg_hf.cards._holds_released_sam", released)
    model.push_to_hub("repo", tags=["more"])
    card = card_of(hub, "me/repo")
    assert card.text.strip() == "My model." and card.data.tags == ["mine", "more"]
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")


def test_unreadable_card_on_the_hub_is_kept(model, hub, monkeypatch, caplog):
    hub.repositories["me/repo"] = {"README.md": b"custom"}

    def fail(*_, **__):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    model.push_to_hub("repo")
    assert (
        hub.repositories["me/repo"]["README.md"] == b"custom"
        and "model.safetensors" in hub.repositories["me/repo"]
    )
    assert "the network is down" in caplog.text


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
def test_loading_the_authors_layout_explains_the_conversion(tmp_path, load, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in the authors' layout; convert it") as error:
        load(tmp_path)
    assert f"conceptseg convert --checkpoint {tmp_path} --sam facebook/sam3 --out DIR" in str(error.value)
