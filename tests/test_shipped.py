"""Tests of embedded checkpoints that are selected by name."""

from __future__ import annotations

import pytest
import transformers

from conceptseg_hf import nano_checkpoint, shipped
from conceptseg_hf.loading import find_checkpoint, load_model_and_processor


@pytest.mark.parametrize("name", [None, "nano", "conceptseg-nano"])
def test_nano_is_found_by_name(name) -> None:
    assert find_checkpoint(name) == str(nano_checkpoint())


def test_other_names_are_folders_or_hub_ids(tmp_path, monkeypatch) -> None:
    assert find_checkpoint("owner/nano") == "owner/nano"
    assert find_checkpoint(tmp_path) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # such as the run folder of a training
    assert find_checkpoint("nano") == str(nano_checkpoint())
    (tmp_path / "nano" / "config.json").touch()
    assert find_checkpoint("nano") == "nano"


def test_missing_checkpoint_names_its_training_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "shipped.py"))
    with pytest.raises(
        FileNotFoundError, match="'mini' is not part of this installation; train it with `make mini`"
    ):
        find_checkpoint("mini")


def test_pipeline_finds_checkpoints_by_name() -> None:
    pipe = transformers.pipeline("concept-segmentation", model="conceptseg-nano", device="cpu")
    model, _ = load_model_and_processor("nano", "cpu")
    assert pipe.model.config.name_or_path == model.config.name_or_path == str(nano_checkpoint())
    assert transformers.pipelines.pipeline is transformers.pipeline
