"""Tests for the selection of the engine of the VLM, without vLLM; tests/with_vllm runs it."""

from __future__ import annotations

import sys

import pytest
import torch

from conceptseg_hf.cli import arguments, main
from conceptseg_hf.generation import GeneratedCompletions
from conceptseg_hf.vlm_engines import VLM_ENGINES


class OwnEngine:
    """An engine that answers "star" to everything."""

    name = "own"

    def generate(self, model, processor, samples, generation_config=None):
        ids = processor.tokenizer("<answer> star </answer>", return_tensors="pt")["input_ids"]
        ids = ids.expand(len(samples), -1)
        states = torch.ones(*ids.shape, model.config.hidden_size)
        return GeneratedCompletions(ids, torch.ones_like(ids, dtype=torch.bool), states)


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # `import vllm` fails


def test_segment_uses_the_selected_engine(model, processor, picture) -> None:
    samples = lambda: [processor.prepare(picture(0), prompt) for prompt in ("red circle", "odd one out")]  # noqa: E731
    options = {"processor": processor, "router": "full_reasoning"}
    before = [result.answer for result in model.segment(samples(), **options)]
    assert model.vlm_engine is None and "star" not in before
    model.set_vlm_engine(OwnEngine())
    assert [result.answer for result in model.segment(samples(), **options)] == ["star", "star"]
    with model.using_vlm_engine("transformers"):
        assert [result.answer for result in model.segment(samples(), **options)] == before
    assert model.vlm_engine.name == "own"
    model.set_vlm_engine("transformers")
    assert model.vlm_engine is None and model._engine is None


def test_missing_vllm_is_one_sentence(model, without_vllm) -> None:
    with pytest.raises(ImportError, match=r'^vlm_engine is "vllm", but vLLM is not installed; install .*\.$'):
        model.set_vlm_engine("vllm")
    assert model.vlm_engine is None
    with pytest.raises(ImportError), model.using_vlm_engine("vllm"):
        pass
    assert model.vlm_engine is None


def test_unknown_engine(model) -> None:
    for use in (model.set_vlm_engine, lambda name: model.using_vlm_engine(name).__enter__()):
        with pytest.raises(ValueError, match="vlm_engine is 'other'; use one of 'transformers', 'vllm'"):
            use("other")


def test_names_of_the_command_are_those_of_the_package() -> None:
    assert arguments.VLM_ENGINES == VLM_ENGINES


@pytest.mark.parametrize("option", ["--vlm-engine", "--mllm-engine"])
def test_command_without_vllm(tmp_path, picture, capsys, without_vllm, option) -> None:
    picture(0).save(tmp_path / "image.png")
    command = ["segment", str(tmp_path / "image.png"), "--prompt", "red circle", option, "vllm"]
    assert main([*command, "--output-dir", str(tmp_path / "output")]) == 2
    assert 'vlm_engine is "vllm", but vLLM is not installed' in capsys.readouterr().err
    assert not list(tmp_path.glob("output/*"))
