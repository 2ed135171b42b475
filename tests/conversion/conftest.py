"""Checkpoints in the authors' layout with random weights, written independently of the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.reference_ctm import random_ctm
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Sam3Model

from conceptseg_hf import ConceptSegConfig

NUM_QUERIES = 6


def spread(model: torch.nn.Module) -> None:
    """Increase the variance of initial weights, so that errors change the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(4)


def old_layout(name: str) -> str:
    """Convert a tensor name of Qwen2.5-VL to the layout of Transformers before 4.52."""
    if name.startswith("model.language_model."):
        return "model." + name[len("model.language_model.") :]
    return name[len("model.") :] if name.startswith("model.visual.") else name


def old_config(config: Any, dtype: str = "float32") -> dict[str, Any]:
    """Convert a Qwen2.5-VL config to the format of Transformers before 4.52, with the authors' additional fields."""
    text, vision = config.text_config, config.vision_config
    return {
        "architectures": ["ConceptSegR1ForConditionalGeneration_qwen2p5"],
        "model_type": "qwen2_5_vl",
        "num_of_query": NUM_QUERIES,
        "torch_dtype": dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        **{
            key: getattr(config, key)
            for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
        **{
            key: getattr(text, key)
            for key in (
                *(
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                ),
                *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
                *("bos_token_id", "eos_token_id", "max_window_layers", "use_sliding_window"),
            )
        },
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text.rope_parameters["mrope_section"]},
        "sliding_window": 32768,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "in_chans": 3,
            **{
                key: getattr(vision, key)
                for key in (
                    *(
                        "depth",
                        "hidden_act",
                        "hidden_size",
                        "intermediate_size",
                        "num_heads",
                        "out_hidden_size",
                    ),
                    *("patch_size", "spatial_merge_size", "window_size", "fullatt_block_indexes"),
                    *("tokens_per_second", "temporal_patch_size"),
                )
            },
        },
    }


def original_tensors(vlm: torch.nn.Module, ctm: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint in the authors' layout."""
    tied = set(vlm.all_tied_weights_keys)
    tensors = {old_layout(name): value for name, value in vlm.state_dict().items() if name not in tied}
    return {name: value.clone().contiguous() for name, value in {**tensors, **ctm}.items()}


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, count: int) -> None:
    """Write `count` shards and their index."""
    names, weight_map = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Parts:
    """Random VLM, CTM and SAM 3, and the checkpoint folders that they are saved to."""

    def __init__(
        self,
        folder: Path,
        processor: Any,
        tied: bool,
        dtype: torch.dtype,
        shards: int,
        prompt_width: int | None,
    ) -> None:
        torch.manual_seed(0)
        config = ConceptSegConfig.from_preset("nano")
        config.vlm_config.tie_word_embeddings = config.vlm_config.text_config.tie_word_embeddings = tied
        self.vlm = Qwen2_5_VLForConditionalGeneration(config.vlm_config).eval()
        self.sam = Sam3Model(config.sam_config).eval()
        spread(self.vlm)
        spread(self.sam)
        self.vlm.to(dtype)
        width = config.hidden_size
        sam_width = prompt_width or config.sam_config.detr_encoder_config.hidden_size
        self.ctm = {
            name: value.to(dtype) for name, value in random_ctm(width, sam_width, NUM_QUERIES, 4).items()
        }
        self.tensors = original_tensors(self.vlm, self.ctm)

        self.checkpoint = folder / "ConceptSeg-R1-tiny"
        self.checkpoint.mkdir()
        content = old_config(config.vlm_config, str(dtype).removeprefix("torch."))
        (self.checkpoint / "config.json").write_text(json.dumps(content))
        if shards > 1:
            save_sharded(self.tensors, self.checkpoint, shards)
        else:
            save_file(self.tensors, self.checkpoint / "model.safetensors", metadata={"format": "pt"})
        processor.tokenizer.save_pretrained(self.checkpoint)
        processor.image_processor.save_pretrained(self.checkpoint)
        (self.checkpoint / "generation_config.json").write_text(
            json.dumps({"eos_token_id": 2, "pad_token_id": 0})
        )

        self.sam_folder = folder / "sam3"
        self.sam.save_pretrained(self.sam_folder)
        processor.sam_image_processor.save_pretrained(self.sam_folder)
        processor.sam_tokenizer.save_pretrained(self.sam_folder)


@pytest.fixture(scope="session")
def make_parts(processor, tmp_path_factory):
    def make(
        tied: bool = True,
        dtype: torch.dtype = torch.float32,
        shards: int = 1,
        prompt_width: int | None = None,
    ) -> Parts:
        return Parts(tmp_path_factory.mktemp("parts"), processor, tied, dtype, shards, prompt_width)

    return make


@pytest.fixture(scope="session")
def parts(make_parts):
    """Shared parts, which tests must not modify."""
    return make_parts(shards=3)
