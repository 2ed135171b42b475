"""Concept prompting of SAM 3: encode an image once, then decode prompts `[Z; E_text; geometry CLS]` (eq. 4).

Transformers' `Sam3Model` is used without modifications. Meta's SAM 3 always appends the CLS token of its geometry
encoder to the prompt, whereas Transformers adds it only if boxes are given. The token depends only on the image, so it
is computed together with the image features and reused.

SAM 3 may be offloaded or split across devices (see `devices`), so the outputs of its parts are moved to the device of
the image features before they are combined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput, Sam3VisionEncoderOutput

from .devices import execution_device, has_hooks, loaded

SAM_PROMPTS = ("concept+text", "concept", "text", "box")
"""Modes of prompting SAM 3 with the VLM's output: the method of the paper, followed by its ablations."""

NO_SPLIT_MODULES = (
    "Sam3ViTEmbeddings",
    "Sam3ViTLayer",
    "Sam3VisionNeck",
    "CLIPTextEmbeddings",
    "CLIPEncoderLayer",
    "Sam3GeometryEncoder",
    "Sam3DetrEncoderLayer",
    "Sam3DetrDecoder",
    "Sam3DotProductScoring",
    "Sam3MaskDecoder",
)
"""Modules of SAM 3 that combine the outputs of their children and must therefore be on a single device."""

BOX_TEXT = "visual"
"""SAM 3's text for prompts that consist only of boxes."""


@dataclass(frozen=True)
class ImageFeatures:
    """SAM 3's features of a batch of images, independent of the prompt.

    Attributes:
        vision: SAM 3's feature pyramid and its position encodings.
        geometry_cls: (B, 1, D) CLS token of the geometry encoder, or None to omit it from the prompt.
    """

    vision: Sam3VisionEncoderOutput
    geometry_cls: Tensor | None

    def __len__(self) -> int:
        return self.vision.fpn_hidden_states[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self.vision.fpn_hidden_states[0].device

    def select(self, rows: Tensor) -> ImageFeatures:
        """Select images by index, in the order of `rows` (N,); indices may be repeated."""
        if rows.tolist() == list(range(len(self))):
            return self  # without copies of the feature pyramid
        rows = rows.to(self.device)
        # The gradient of `index_select` is faster than that of indexing.
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def repeat(self, count: int) -> ImageFeatures:
        """Repeat each image a number of times in a row; the gradient is faster than that of `select`."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """Apply a function to all tensors."""
        vision, tokens = self.vision, self.geometry_cls
        return ImageFeatures(
            vision=Sam3VisionEncoderOutput(
                fpn_hidden_states=tuple(map(function, vision.fpn_hidden_states)),
                fpn_position_encoding=tuple(map(function, vision.fpn_position_encoding)),
            ),
            geometry_cls=None if tokens is None else function(tokens),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Concatenate batches, either all with or all without `geometry_cls`."""
        if len(parts) == 1:
            return parts[0]  # without copies of the feature pyramid
        visions = [part.vision for part in parts]
        tokens = [part.geometry_cls for part in parts if part.geometry_cls is not None]
        return cls(
            vision=Sam3VisionEncoderOutput(
                fpn_hidden_states=tuple(
                    torch.cat(levels) for levels in zip(*(vision.fpn_hidden_states for vision in visions))
                ),
                fpn_position_encoding=tuple(
                    torch.cat(levels) for levels in zip(*(vision.fpn_position_encoding for vision in visions))
                ),
            ),
            geometry_cls=torch.cat(tokens) if tokens else None,
        )


def encode_image(sam: Sam3Model, pixel_values: Tensor, geometry_cls: bool = True) -> ImageFeatures:
    """Encode images.

    Args:
        sam: SAM 3.
        pixel_values: (B, 3, S, S) normalized pixels; S is SAM 3's image size.
        geometry_cls: Whether to append the geometry encoder's CLS token to prompts on these images.
    """
    with loaded(sam):
        pixel_values = pixel_values.to(execution_device(sam))
        vision = sam.get_vision_features(pixel_values=pixel_values, return_dict=True)
    return ImageFeatures(vision, _geometry_cls(sam, vision) if geometry_cls else None)


def _geometry_cls(sam: Sam3Model, vision: Sam3VisionEncoderOutput) -> Tensor:
    """Compute the geometry encoder's CLS token without boxes."""
    encoder = sam.geometry_encoder
    features, positions = vision.fpn_hidden_states[-2], vision.fpn_position_encoding[-2]
    if hasattr(sam, "_hf_hook") or has_hooks(
        encoder
    ):  # only the encoder's own forward moves inputs and weights
        tokens, mask = box_tokens(sam, vision, features.new_zeros(len(features), 1, 4), valid=False)
        return tokens[mask][:, None]
    # The steps of its forward without the encoding of the padding box, which takes longest. A padding token
    # replaces the box, so that the results are equal to the last bit.
    token = encoder.cls_embed.weight
    pair = torch.cat([token, torch.zeros_like(token)])[None].expand(len(features), -1, -1).contiguous()
    tokens = encoder.prompt_layer_norm(encoder.final_proj(pair))
    mask = torch.tensor([True, False], device=features.device).expand(len(features), -1)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=tokens, attention_mask=mask
    )
    for layer in encoder.layers:
        tokens = layer(
            prompt_feats=tokens,
            vision_feats=features.flatten(2).transpose(1, 2),
            vision_pos_encoding=positions.flatten(2).transpose(1, 2),
            prompt_mask=attention_mask,
        )
    return encoder.output_layer_norm(tokens)[:, :1]


def box_tokens(
    sam: Sam3Model, vision: Sam3VisionEncoderOutput, boxes: Tensor, valid: bool = True
) -> tuple[Tensor, Tensor]:
    """Encode boxes with the geometry encoder.

    Args:
        sam: SAM 3.
        vision: Features of B images.
        boxes: (B, N, 4) boxes, see `decode`.
        valid: False to mark the boxes as padding.

    Returns:
        (B, N + 1, D) tokens of the boxes followed by CLS, and their (B, N + 1) mask.
    """
    shape = boxes.shape[:2]
    with loaded(sam, *_read_directly(sam)):
        geometry = sam.geometry_encoder(
            box_embeddings=boxes,
            box_mask=torch.full(shape, valid, dtype=torch.bool, device=boxes.device),
            box_labels=torch.full(shape, int(valid), dtype=torch.long, device=boxes.device),
            img_feats=vision.fpn_hidden_states[:-1],
            img_pos_embeds=vision.fpn_position_encoding[:-1],
        )
    return geometry.last_hidden_state, geometry.attention_mask.bool()


def _read_directly(sam: Sam3Model) -> tuple[nn.Module, ...]:
    """Return modules with weights that SAM 3 reads without calling the modules, which bypasses Accelerate's hooks."""
    decoder = sam.detr_decoder
    return (
        sam.geometry_encoder.cls_embed,
        decoder.query_embed,
        decoder.reference_points,
        decoder.presence_token,
    )


def encode_text(sam: Sam3Model, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Encode phrases.

    Args:
        sam: SAM 3.
        input_ids: (B, T) token ids of SAM 3's tokenizer.
        attention_mask: (B, T), nonzero at tokens, zero at padding.

    Returns:
        (B, T, D) explicit prompt embeddings E_text, and their (B, T) boolean mask.
    """
    with loaded(sam):
        output = sam.get_text_features(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    return output.pooler_output, attention_mask.bool()


def decode(
    sam: Sam3Model,
    features: ImageFeatures,
    text_embeds: Tensor | None = None,
    text_mask: Tensor | None = None,
    concept_embeds: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Sam3ImageSegmentationOutput:
    """Decode one prompt per image; differentiable with respect to the prompt.

    Args:
        sam: SAM 3.
        features: Features of B images.
        text_embeds: (B, T, D) explicit prompt embeddings E_text, or None.
        text_mask: (B, T) mask of `text_embeds`; required with `text_embeds`.
        concept_embeds: (B, L2, D) concept tokens Z, or None.
        boxes: (B, N, 4) boxes of the concept as (center x, center y, width, height) in fractions of the image, or None.

    Returns:
        SAM 3's output, including `semantic_seg` (B, 1, h, w) and `presence_logits` (B, 1).

    Raises:
        ValueError: If neither concept tokens nor text embeddings are given, or text embeddings without their mask.
    """
    if text_embeds is not None and text_mask is None:
        raise ValueError("decode: text_embeds is given without text_mask; pass both.")
    if text_embeds is None and concept_embeds is None:
        raise ValueError(
            "decode: both text_embeds and concept_embeds are None; pass at least one of them as the prompt."
        )
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    if concept_embeds is not None:
        tokens.append(concept_embeds)
        masks.append(torch.ones(concept_embeds.shape[:2], dtype=torch.bool, device=concept_embeds.device))
    if text_embeds is not None and text_mask is not None:
        tokens.append(text_embeds)
        masks.append(text_mask)
    if boxes is not None:
        geometry, geometry_mask = box_tokens(sam, features.vision, boxes)
        tokens.append(geometry)
        masks.append(geometry_mask)
    elif features.geometry_cls is not None:
        tokens.append(features.geometry_cls)
        masks.append(
            torch.ones(features.geometry_cls.shape[:2], dtype=torch.bool, device=features.geometry_cls.device)
        )
    device = features.device
    prompt = torch.cat([token.to(device, tokens[0].dtype) for token in tokens], dim=1)
    with loaded(*_read_directly(sam)):
        return sam(
            vision_embeds=features.vision,
            text_embeds=BaseModelOutputWithPooling(pooler_output=prompt),
            attention_mask=torch.cat([mask.to(device) for mask in masks], dim=1),
            return_dict=True,
        )
