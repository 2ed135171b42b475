"""InternVL (versions 2.5 to 3.5 in Transformers' format): images of one size, and one-dimensional positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .family import Vlm, VlmFamily

_TOKEN_SIDE = 28  # pixels: patches of 14, of which 2 x 2 are an image token
_NO_TILES = {"crop_to_patches": False}


class InternVlFamily(VlmFamily):
    """Each image is resized to the input size of the vision encoder; it is not cropped to tiles."""

    model_type = "internvl"
    canvas_size = 448
    coordinate_scale = 1000.0  # InternVL was trained with boxes in thousandths of the image
    supports_vllm = True
    vllm_image_options = _NO_TILES

    def image_token(self, tokenizer: Any) -> str:
        """Return the tokenizer's context token, by default `<IMG_CONTEXT>`."""
        return getattr(tokenizer, "context_image_token", None) or "<IMG_CONTEXT>"

    def read_images(
        self,
        image_processor: Any,
        images: Sequence[Any],
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Return the pixels of images, (images, 3, S, S)."""
        encoded = image_processor(images=list(images), **_NO_TILES, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"]}, [_num_tokens(image_processor)] * len(images)

    def make_processor(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str,
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> ProcessorMixin:
        """Create a processor that does not crop images to tiles, unlike the default."""
        from transformers import InternVLProcessor, InternVLVideoProcessor  # these require torchvision

        processor = InternVLProcessor(
            image_processor,
            tokenizer,
            InternVLVideoProcessor(),
            image_seq_length=_num_tokens(image_processor),
            chat_template=chat_template,
        )
        processor.images_kwargs = dict(_NO_TILES)  # type: ignore[assignment]  # keys of this image processor
        return processor

    def chat_template(self, image_token: str) -> str:
        """Return a template in InternVL's format."""
        return (
            r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
            r"{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            r"{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            rf"{{{{ '{image_token}\n' }}}}"
            r"{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
            r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )

    def image_text(self, image_token: str, count: int) -> str:
        """Return the image tokens between the tokens for the borders of an image."""
        return f"<img>{image_token * count}</img>"

    def pixels_per_image(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return 1 for each image."""
        return [1] * len(inputs["pixel_values"])

    def tokens_per_image(self, config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of tokens of an image of the given size for each image."""
        patches = inputs["pixel_values"].shape[-1] // config.vision_config.patch_size[0]
        return [int(patches * config.downsample_ratio) ** 2] * len(inputs["pixel_values"])

    def vision_token_ids(self, config: PreTrainedConfig) -> list[int]:
        """Return the id of the image token."""
        return [int(config.image_token_id)]

    def vision_tower(self, vlm: Vlm) -> nn.Module:
        """Return the VLM's vision encoder."""
        return vlm.model.vision_tower

    def encode_images(self, vlm: Vlm, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the (tokens, C) image tokens of each image."""
        return list(vlm.model.get_image_features(images["pixel_values"]).pooler_output)

    def encoded_images(self, vlm: Vlm, tokens: Sequence[Tensor]) -> dict[str, Any]:
        """Return the argument `mm_encoder_outputs`."""
        return {
            "mm_encoder_outputs": {
                "image": BaseModelOutputWithPooling(pooler_output=torch.stack(list(tokens)))
            }
        }

    def vllm_prompt(self, config: PreTrainedConfig, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens without those for the borders of images, which vLLM adds, too."""
        prompt = super().vllm_prompt(config, token_ids)
        images = [position for position, token in enumerate(prompt) if token == config.image_token_id]
        borders = {position + offset for position in images for offset in (-1, 1)}
        return [token for position, token in enumerate(prompt) if position not in borders]

    def vllm_image_data(self, tokens: Sequence[Tensor], images: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the image tokens of each image."""
        return [image.cpu() for image in tokens]


def _num_tokens(image_processor: Any) -> int:
    """Return the number of image tokens of an image."""
    return (image_processor.size["height"] // _TOKEN_SIDE) ** 2
