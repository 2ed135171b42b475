"""Conversion to the authors' layout and back is lossless."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, nano_checkpoint
from conceptseg_hf.conversion import MANIFEST_NAME, ConversionError, convert, to_original

from .conftest import old_config


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(actual, expected) -> None:
    assert set(actual) == set(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and torch.equal(actual[name], expected[name]), name


def test_other_families_have_no_original_layout(tmp_path):
    config = ConceptSegConfig.from_preset("nano-qwen3")
    config.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="'qwen3_vl'; --to-original requires 'qwen2_5_vl'"):
        to_original(tmp_path, tmp_path / "original")


def test_nano_round_trip(tmp_path):
    original = to_original(nano_checkpoint(), tmp_path / "original")
    back = convert(original, nano_checkpoint(), tmp_path / "ours")
    assert_same(all_tensors(back), all_tensors(nano_checkpoint()))
    processors = [AutoProcessor.from_pretrained(folder) for folder in (nano_checkpoint(), back)]
    for name in ("canvas_size", "coordinate_scale", "sam_text_length", "prompt_template"):
        assert getattr(processors[0], name) == getattr(processors[1], name)
    assert processors[0].chat_text("x", 2) == processors[1].chat_text("x", 2)
    assert processors[0].tokenizer.get_vocab() == processors[1].tokenizer.get_vocab()
    assert processors[0].sam_tokenizer.get_vocab() == processors[1].sam_tokenizer.get_vocab()
    configs = [
        ConceptSegForSegmentation.from_pretrained(folder).config for folder in (nano_checkpoint(), back)
    ]
    assert configs[0].ctm_config.to_dict() == configs[1].ctm_config.to_dict()
    assert configs[1].non_default_fields == configs[0].non_default_fields
    assert processors[1].to_dict() == processors[0].to_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("original_format", [True, False], ids=["saved-original", "saved-ours"])
def test_sharded_bfloat16_round_trip(make_model, processor, tmp_path, tied, original_format):
    model = make_model(tied=tied)
    model.vlm.to(torch.bfloat16)
    folder = tmp_path / "ours"
    model.save_pretrained(folder, max_shard_size="2MB", save_original_format=original_format)
    processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    original = to_original(folder, tmp_path / "original", shard_bytes=1_500_000)
    back = convert(original, folder, tmp_path / "back", shard_bytes=1_000_000)
    expected = {
        name: value for name, value in model.state_dict().items() if not tied or "lm_head" not in name
    }
    assert_same(all_tensors(back), expected)
    loaded = ConceptSegForSegmentation.from_pretrained(back)
    assert_same(loaded.state_dict(), model.state_dict())
    assert (
        loaded.vlm.dtype == torch.bfloat16 and loaded.sam.dtype == loaded.ctm.queries.dtype == torch.float32
    )


def test_to_original_restores_the_authors_layout(parts, tmp_path):
    ours = convert(parts.checkpoint, parts.sam_folder, tmp_path / "ours")
    original = to_original(ours, tmp_path / "original")
    assert_same(all_tensors(original), parts.tensors)
    config, expected = json.loads((original / "config.json").read_text()), old_config(parts.vlm.config)
    assert {name: config[name] for name in expected if name not in ("vision_config", "sliding_window")} == {
        name: value for name, value in expected.items() if name not in ("vision_config", "sliding_window")
    }
    assert expected["vision_config"].items() <= config["vision_config"].items()
    assert "sam" not in json.loads((original / MANIFEST_NAME).read_text())["sources"]


def test_transformers_loads_the_vlm_from_the_authors_layout(parts, tmp_path):
    original = to_original(
        convert(parts.checkpoint, parts.sam_folder, tmp_path / "ours"), tmp_path / "original"
    )
    vlm, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(original, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert_same(vlm.state_dict(), parts.vlm.state_dict())
    assert all(
        name.startswith(("connector.", "learnable_query.", "proj_to_sam."))
        for name in info["unexpected_keys"]
    )


def test_processor_files_are_compatible_with_transformers_4(tmp_path):
    original = to_original(nano_checkpoint(), tmp_path / "original")
    tokenizer = json.loads((original / "tokenizer_config.json").read_text())
    assert tokenizer["processor_class"] == "Qwen2_5_VLProcessor"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)  # Transformers 4 fails on a list
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    images = json.loads((original / "preprocessor_config.json").read_text())
    assert images["min_pixels"] == images["size"]["shortest_edge"] and images["max_pixels"] > 0
    template = json.loads((original / "chat_template.json").read_text())["chat_template"]
    assert tokenizer["chat_template"] == template == (nano_checkpoint() / "chat_template.jinja").read_text()
    assert (original / "generation_config.json").is_file()
