"""Qwen3-VL (dense): Qwen2.5-VL's inputs, with features of several vision layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ProcessorMixin

from .family import Vlm
from .qwen2_5_vl import Qwen2_5VlFamily


class Qwen3VlFamily(Qwen2_5VlFamily):
    """Image tokens have one vector for the embeddings, and one for each of the first layers of the language model.

    The vectors of a token are concatenated in `encode_images`, which is also vLLM's format.
    """

    model_type = "qwen3_vl"
    canvas_size = 608  # a multiple of its patches and merges (16 * 2), so that images are resized once
    coordinate_scale = 1000.0  # Qwen3-VL was trained with boxes in thousandths of the image
    # vLLM reads DeepStack features of encoded images only if it has the vision tower, which it omits if the limit is 0;
    # prompts have up to two images. Its images for profiling memory would run through the tower.
    vllm_options: ClassVar[Mapping[str, Any]] = {
        "limit_mm_per_prompt": {"image": 2, "video": 0},
        "skip_mm_profiling": True,
    }

    def _processor(self, image_processor: Any, tokenizer: Any, chat_template: str) -> ProcessorMixin:
        from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor  # these require torchvision

        return Qwen3VLProcessor(
            image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=chat_template
        )

    def encode_images(self, vlm: Vlm, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the (tokens, C * (1 + D)) image tokens of each image, with D the number of DeepStack layers."""
        output = vlm.model.get_image_features(**images)
        return [
            torch.cat(parts, dim=-1)
            for parts in zip(output.pooler_output, *output.deepstack_features, strict=True)
        ]

    def encoded_images(self, vlm: Vlm, tokens: Sequence[Tensor]) -> dict[str, Any]:
        """Return the argument `mm_encoder_outputs`, including the features of the DeepStack layers."""
        # Deferred, since importing the model takes time.
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        width = vlm.config.get_text_config().hidden_size
        embeds, *features = zip(*(each.split(width, dim=-1) for each in tokens), strict=True)
        # `get_image_features` also returns tuples with one tensor per image.
        parts: dict[str, Any] = {"pooler_output": embeds, "deepstack_features": features}
        image = BaseModelOutputWithDeepstackFeatures(**parts)
        return {"mm_encoder_outputs": {"image": image}}
