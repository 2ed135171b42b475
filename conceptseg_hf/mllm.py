"""What is particular to one MLLM family. Everything else in the package sees an MLLM through these functions.

Known family: Qwen2.5-VL. A further one (Qwen3-VL) is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from .devices import loaded, move_to_hooks

SUPPORTED_MODEL_TYPES = ("qwen2_5_vl",)

# What the MLLM reads. Without `mm_token_type_ids` the positions of image tokens are silently wrong.
INPUT_NAMES = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")

_VISION_TOKEN_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


def check_supported(config: PreTrainedConfig) -> None:
    """Raises a ValueError if the family of this MLLM configuration is not known."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"The MLLM's model_type is {config.model_type!r}, which ConceptSeg does not know; use one of "
            f"{', '.join(map(repr, SUPPORTED_MODEL_TYPES))}."
        )


def vision_token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the tokens that stand for images; generated ones would break the next forward pass."""
    return sorted(
        {int(token) for name in _VISION_TOKEN_NAMES if (token := getattr(config, name, None)) is not None}
    )


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Picks the MLLM's tensors out of a batch.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in INPUT_NAMES if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"The MLLM's inputs lack {', '.join(missing)}; pass all that the processor's `collate` returns."
        )
    return {name: inputs[name] for name in INPUT_NAMES}


def full_pass(vlm: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> ModelOutput:
    """One full forward pass over `model_inputs`, without the language-model head.

    Args:
        vlm: The MLLM.
        inputs: See `model_inputs`.
        **options: What else to return: `output_hidden_states`, `output_attentions`, `use_cache`.

    Returns:
        `last_hidden_state` (B, L, C): last-layer, post-norm hidden states; and `hidden_states`, `attentions` and
        `past_key_values` as asked for, None otherwise.
    """
    with loaded(vlm):
        output = vlm.base_model(**move_to_hooks(inputs, vlm), **options, return_dict=True)
    forget_positions(vlm)
    return output


def last_hidden_states(vlm: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, C) last-layer, post-norm hidden states of one full forward pass over `model_inputs`."""
    return full_pass(vlm, inputs, use_cache=False).last_hidden_state


def forget_positions(vlm: PreTrainedModel) -> None:
    """Drops the position offsets that Qwen keeps on the module, so that no call depends on an earlier one."""
    vlm.model.rope_deltas = None


def vision_tower(vlm: PreTrainedModel) -> nn.Module:
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
