"""What is particular to one VLM family. Everything else in the package sees a VLM through these functions.

Known family: Qwen2.5-VL. A further one (Qwen3-VL) is added here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .devices import loaded, move_to_hooks

SUPPORTED_MODEL_TYPES = ("qwen2_5_vl",)

Vlm: TypeAlias = Any
"""A PreTrainedModel of a known family that generates; the stubs of `generate` fit no model class."""

# What the VLM reads. Without `mm_token_type_ids` the positions of image tokens are silently wrong.
INPUT_NAMES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")

_VISION_TOKEN_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


def check_supported(config: PreTrainedConfig) -> None:
    """Raises a ValueError if the family of this VLM configuration is not known."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"The VLM's model_type is {config.model_type!r}, which ConceptSeg does not know; use one of "
            f"{', '.join(map(repr, SUPPORTED_MODEL_TYPES))}."
        )


def vision_token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the tokens that stand for images; generated ones would break the next forward pass."""
    return sorted(
        {int(token) for name in _VISION_TOKEN_NAMES if (token := getattr(config, name, None)) is not None}
    )


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Picks the VLM's tensors out of a batch.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in INPUT_NAMES if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"The VLM's inputs lack {', '.join(missing)}; pass all that the processor's `collate` returns."
        )
    return {name: inputs[name] for name in INPUT_NAMES}


def patches_of_rows(config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[tuple[slice, slice]]:
    """Per row of a batch, which rows of `image_grid_thw` and which of `pixel_values` are its images'."""
    grids = inputs["image_grid_thw"].tolist()
    merged = config.vision_config.spatial_merge_size**2
    rows: list[tuple[slice, slice]] = []
    image = patch = 0
    for tokens in (inputs["input_ids"] == config.image_token_id).sum(dim=1).tolist():
        first_image, first_patch = image, patch
        while tokens > 0:
            patches = math.prod(grids[image])
            tokens, image, patch = tokens - patches // merged, image + 1, patch + patches
        rows.append((slice(first_image, image), slice(first_patch, patch)))
    return rows


def select_rows(
    config: PreTrainedConfig, inputs: Mapping[str, Tensor], rows: Sequence[int]
) -> dict[str, Tensor]:
    """`model_inputs` of some rows of a batch, with their images."""
    images, patches = zip(*(patches_of_rows(config, inputs)[row] for row in rows), strict=True)
    selected = {
        name: inputs[name][list(rows)]
        for name in INPUT_NAMES
        if name not in ("pixel_values", "image_grid_thw")
    }
    selected["pixel_values"] = torch.cat([inputs["pixel_values"][part] for part in patches])
    selected["image_grid_thw"] = torch.cat([inputs["image_grid_thw"][part] for part in images])
    return selected


def continue_positions(vlm: Vlm, attention_mask: Tensor, rows: Sequence[int]) -> Tensor:
    """Positions of rows that continue prompts which the VLM has just read; `generate` then goes on from these.

    Args:
        vlm: The VLM.
        attention_mask: (B, L) of prompts and what follows them.
        rows: (B,) which of the prompts each row continues.

    Returns:
        (3, B, L) positions; right from the end of the prompts on.
    """
    vlm.model.rope_deltas = vlm.model.rope_deltas[list(rows)]
    positions = attention_mask.long().cumsum(dim=1) - 1
    return (positions + vlm.model.rope_deltas)[None].expand(3, -1, -1)


def encode_images(vlm: Vlm, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
    """The image tokens (tokens, C) of each image."""
    return list(vlm.model.get_image_features(pixel_values, image_grid_thw).pooler_output)


def encoded_images(tokens: Sequence[Tensor]) -> dict[str, Any]:
    """What the VLM takes in the place of `pixel_values`: the image tokens of all images of a batch, in their order."""
    # A tuple, as the VLM's own `get_image_features` returns it.
    image = BaseModelOutputWithPooling(pooler_output=tuple(tokens))  # type: ignore[arg-type]
    return {"mm_encoder_outputs": {"image": image}}


def full_pass(vlm: Vlm, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """One full forward pass over `model_inputs`, without the language-model head.

    Args:
        vlm: The VLM.
        inputs: See `model_inputs`.
        **options: What else to return: `output_hidden_states`, `output_attentions`, `use_cache`.

    Returns:
        `last_hidden_state` (B, L, C): last-layer, post-norm hidden states; and `hidden_states`, `attentions` and
        `past_key_values` as asked for, None otherwise.
    """
    with loaded(vlm):
        output = vlm.base_model(**move_to_hooks(inputs, vlm), **options, return_dict=True)
    reset_rope_deltas(vlm)
    return output


def last_hidden_states(vlm: Vlm, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, C) last-layer, post-norm hidden states of one full forward pass over `model_inputs`."""
    return full_pass(vlm, inputs, use_cache=False).last_hidden_state


def reset_rope_deltas(vlm: Vlm) -> None:
    """Drops the position offsets that Qwen keeps on the module, so that no call depends on an earlier one."""
    vlm.model.rope_deltas = None


def vision_tower(vlm: Vlm) -> nn.Module:
    """The module that encodes pictures."""
    return vlm.model.visual


def make_processor(image_processor: Any, tokenizer: Any, chat_template: str) -> ProcessorMixin:
    """The family's plain processor around an image processor and a tokenizer."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor  # they need torchvision

    return Qwen2_5_VLProcessor(
        image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=chat_template
    )


def chat_template(image_token: str) -> str:
    """The family's form of a chat, for a tokenizer that comes without one (Jinja)."""
    return (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        r"{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        rf"<|vision_start|>{image_token}<|vision_end|>"
        r"{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
