"""Tiny random models of each family of VLMs, for tests that hold for all families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from conceptseg_hf import ConceptSegConfig, ConceptSegProcessor
from conceptseg_hf.vlm_families import FAMILIES

all_families = pytest.mark.parametrize("vlm_family", list(FAMILIES), indirect=True, scope="session")
"""Run a test that uses the fixtures `processor`, `model` or `make_model` with each family."""


def tiny_config(family: str, **overrides) -> ConceptSegConfig:
    """Return the configuration of nano with a VLM of the family."""
    if family == "internvl":
        overrides.setdefault("vlm_config", _internvl())
    preset = "nano-qwen3" if family == "qwen3_vl" else "nano"
    return ConceptSegConfig.from_preset(preset, **overrides)


def _internvl() -> dict:
    qwen = ConceptSegConfig.from_preset("nano").vlm_config
    text = {**qwen.text_config.to_dict(), "model_type": "qwen2"}
    del text["rope_parameters"], text["layer_types"]
    return {
        "model_type": "internvl",
        "tie_word_embeddings": True,
        "image_token_id": qwen.image_token_id,
        "image_seq_length": 4,
        "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
        },
    }


def tiny_processor(
    family: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast], **arguments
) -> ConceptSegProcessor:
    """Return a processor for `tiny_config`, with images of 64 pixels (16 or 4 image tokens)."""
    # These require torchvision or the shim of conceptseg_hf, which must be imported first.
    from transformers import GotOcr2ImageProcessor, Qwen2VLImageProcessor

    if family == "internvl":
        image_processor = GotOcr2ImageProcessor(size={"height": 56, "width": 56})
        tokenizer = make_tokenizer(model_specific_special_tokens=INTERNVL_TOKENS)
    else:
        tokenizer = make_tokenizer()
        image_processor = Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=1)
    return ConceptSegProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        canvas_size=64,
        coordinate_scale=100,
        vlm_family=family,
        **arguments,
    )


INTERNVL_TOKENS = {
    "context_image_token": "<|image_pad|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<|video_pad|>",
}


def num_encoded_images(args, kwargs) -> int:
    """Return the number of images in a call of a vision tower."""
    return len(kwargs["grid_thw"] if "grid_thw" in kwargs else kwargs["pixel_values"])
