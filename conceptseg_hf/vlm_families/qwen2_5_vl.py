"""Qwen2.5-VL, the family of the paper."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .family import Vlm, VlmFamily

_VISION_TOKEN_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)


class Qwen2_5VlFamily(VlmFamily):  # noqa: N801 (as in Transformers)
    """Images of any size as patches with their grids, and three-dimensional positions with offsets on the module."""

    model_type = "qwen2_5_vl"
    # Without `mm_token_type_ids`, the positions of image tokens would be silently wrong.
    row_names = ("input_ids", "attention_mask", "mm_token_type_ids")
    image_names = ("image_grid_thw",)
    canvas_size = 600  # the paper's, which the image processor rounds to 588
    coordinate_scale = 1.0
    supports_vllm = True

    def image_token(self, tokenizer: Any) -> str:
        """Return the tokenizer's image token, by default `<|image_pad|>`."""
        return getattr(tokenizer, "image_token", None) or "<|image_pad|>"

    def read_images(
        self,
        image_processor: Any,
        images: Sequence[Any],
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Return the patches of images, (patches, d), and their grids, (images, 3)."""
        size = _image_size(image_processor, canvas_size, pixel_limits)
        encoded = image_processor(images=list(images), size=size, return_tensors="pt")
        grids = encoded["image_grid_thw"]
        counts = (grids.prod(dim=-1) // image_processor.merge_size**2).tolist()
        return {"pixel_values": encoded["pixel_values"], "image_grid_thw": grids}, counts

    def make_processor(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str,
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> ProcessorMixin:
        """Create a processor of the family."""
        image_processor = copy.deepcopy(image_processor)
        image_processor.size = _image_size(image_processor, canvas_size, pixel_limits)
        return self._processor(image_processor, tokenizer, chat_template)

    def _processor(self, image_processor: Any, tokenizer: Any, chat_template: str) -> ProcessorMixin:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor  # these require torchvision

        return Qwen2_5_VLProcessor(
            image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=chat_template
        )

    def chat_template(self, image_token: str) -> str:
        """Return a template in Qwen's format."""
        return (
            r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
            r"{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            rf"<|vision_start|>{image_token}<|vision_end|>"
            r"{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
            r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )

    def pixels_per_image(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of patches of each image."""
        return inputs["image_grid_thw"].prod(dim=-1).tolist()

    def tokens_per_image(self, config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of merged patches of each image."""
        merged = config.vision_config.spatial_merge_size**2
        return [patches // merged for patches in self.pixels_per_image(inputs)]

    def vision_token_ids(self, config: PreTrainedConfig) -> list[int]:
        """Return the ids of the tokens for images, videos and their borders."""
        return sorted(
            {int(token) for name in _VISION_TOKEN_NAMES if (token := getattr(config, name, None)) is not None}
        )

    def vision_tower(self, vlm: Vlm) -> nn.Module:
        """Return the VLM's vision encoder."""
        return vlm.model.visual

    def encode_images(self, vlm: Vlm, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the (tokens, C) image tokens of each image."""
        return list(vlm.model.get_image_features(**images).pooler_output)

    def encoded_images(self, vlm: Vlm, tokens: Sequence[Tensor]) -> dict[str, Any]:
        """Return the argument `mm_encoder_outputs`."""
        # `get_image_features` also returns a tuple.
        image = BaseModelOutputWithPooling(pooler_output=tuple(tokens))  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": image}}

    def vllm_image_data(self, tokens: Sequence[Tensor], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return image tokens and grids."""
        return {
            "image_embeds": torch.cat(list(tokens)).cpu(),
            "image_grid_thw": images["image_grid_thw"].cpu(),
        }

    def prompt_positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return no argument: the model computes the positions from grids, token types and attention mask."""
        return {}

    def continue_positions(self, vlm: Vlm, attention_mask: Tensor, rows: Sequence[int]) -> Tensor:
        """Compute (3, B, L) positions, and expand the VLM's position offsets to the rows."""
        vlm.model.rope_deltas = vlm.model.rope_deltas[list(rows)]
        positions = super().continue_positions(vlm, attention_mask, rows)
        return (positions + vlm.model.rope_deltas)[None].expand(3, -1, -1)

    def reset(self, vlm: Vlm) -> None:
        """Reset the position offsets that the model stores on the module."""
        vlm.model.rope_deltas = None


def _image_size(
    image_processor: Any, canvas_size: int, pixel_limits: tuple[int, int] | None
) -> dict[str, int]:
    """Return the image processor's `size`; by default, it keeps the canvas size, except for rounding to patches."""
    if pixel_limits is None:
        factor = image_processor.patch_size * image_processor.merge_size
        pixel_limits = factor**2, (canvas_size + factor) ** 2
    return dict(zip(("shortest_edge", "longest_edge"), pixel_limits, strict=True))
