"""Functions specific to a VLM family; the rest of the package accesses the VLM only through them.

Qwen2.5-VL is supported. Support for further families (such as Qwen3-VL) should be added here.
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
"""A generative PreTrainedModel of a supported family; `Any`, since the stubs of `generate` match no model class."""

# Inputs of the VLM. Without `mm_token_type_ids`, the positions of image tokens would be silently wrong.
INPUT_NAMES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")

_VISION_TOKEN_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the VLM family of the configuration is not supported."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"The VLM's model_type {config.model_type!r} is not supported; use one of "
            f"{', '.join(map(repr, SUPPORTED_MODEL_TYPES))}."
        )


def vision_token_ids(config: PreTrainedConfig) -> list[int]:
    """Return the ids of vision tokens, which must not be generated since they would break the next forward pass."""
    return sorted(
        {int(token) for name in _VISION_TOKEN_NAMES if (token := getattr(config, name, None)) is not None}
    )


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Select the VLM's inputs from a batch.

    Raises:
        ValueError: If an input is missing.
    """
    missing = [name for name in INPUT_NAMES if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"The VLM's inputs lack {', '.join(missing)}; pass the complete output of the processor's `collate`."
        )
    return {name: inputs[name] for name in INPUT_NAMES}


def patches_of_rows(config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[tuple[slice, slice]]:
    """Return the slices of `image_grid_thw` and of `pixel_values` that belong to each row of a batch."""
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
    """Select rows of a batch of `model_inputs`, including their images."""
    images, patches = zip(*(patches_of_rows(config, inputs)[row] for row in rows), strict=True)
    selected = {
        name: inputs[name][list(rows)]
        for name in INPUT_NAMES
        if name not in ("pixel_values", "image_grid_thw")
    }
    selected["pixel_values"] = torch.cat([inputs["pixel_values"][rows_of] for rows_of in patches])
    selected["image_grid_thw"] = torch.cat([inputs["image_grid_thw"][rows_of] for rows_of in images])
    return selected


def continue_positions(vlm: Vlm, attention_mask: Tensor, rows: Sequence[int]) -> Tensor:
    """Compute the positions of rows that continue prompts from the VLM's last forward pass.

    Also expands the VLM's position offsets to the rows, so that `generate` can continue from them.

    Args:
        vlm: The VLM.
        attention_mask: (B, L) attention mask of prompts and completions.
        rows: (B,) index of the prompt that each row continues.

    Returns:
        (3, B, L) positions, valid only after the prompts.
    """
    vlm.model.rope_deltas = vlm.model.rope_deltas[list(rows)]
    positions = attention_mask.long().cumsum(dim=1) - 1
    return (positions + vlm.model.rope_deltas)[None].expand(3, -1, -1)


def encode_images(vlm: Vlm, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
    """Encode images; return the image tokens (tokens, C) of each image."""
    return list(vlm.model.get_image_features(pixel_values, image_grid_thw).pooler_output)


def encoded_images(tokens: Sequence[Tensor]) -> dict[str, Any]:
    """Return VLM arguments that replace `pixel_values` by the image tokens of all images of a batch, in order."""
    # `get_image_features` also returns a tuple.
    image = BaseModelOutputWithPooling(pooler_output=tuple(tokens))  # type: ignore[arg-type]
    return {"mm_encoder_outputs": {"image": image}}


def full_pass(vlm: Vlm, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """Run a forward pass over `model_inputs` without the language-model head.

    Args:
        vlm: The VLM.
        inputs: See `model_inputs`.
        **options: `output_hidden_states`, `output_attentions` and `use_cache`.

    Returns:
        The model output with `last_hidden_state` (B, L, C), the last-layer, post-norm hidden states, and with
        `hidden_states`, `attentions` and `past_key_values` if requested by `options`.
    """
    with loaded(vlm):
        output = vlm.base_model(**move_to_hooks(inputs, vlm), **options, return_dict=True)
    reset_rope_deltas(vlm)
    return output


def last_hidden_states(vlm: Vlm, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the (B, L, C) last-layer, post-norm hidden states of a forward pass over `model_inputs`."""
    return full_pass(vlm, inputs, use_cache=False).last_hidden_state


def reset_rope_deltas(vlm: Vlm) -> None:
    """Reset the position offsets that Qwen stores on the module, so that calls are independent of each other."""
    vlm.model.rope_deltas = None


def vision_tower(vlm: Vlm) -> nn.Module:
    """Return the VLM's vision encoder."""
    return vlm.model.visual


def make_processor(image_processor: Any, tokenizer: Any, chat_template: str) -> ProcessorMixin:
    """Create the standard processor of the VLM family from an image processor and a tokenizer."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor  # these require torchvision

    return Qwen2_5_VLProcessor(
        image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=chat_template
    )


def chat_template(image_token: str) -> str:
    """Return the Jinja chat template of the VLM family, for tokenizers without a chat template."""
    return (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        r"{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        rf"<|vision_start|>{image_token}<|vision_end|>"
        r"{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
