"""SAM 3 as a decoder of concept prompts: encode an image once, decode any `[Z; E_text; geometry CLS]` (eq. 4).

Transformers' `Sam3Model` is used as it is. Meta's SAM 3 always appends the CLS token of its geometry encoder
to the prompt; Transformers adds it only where boxes are given. The token depends on the image alone, so it
is computed with the image features and reused.

SAM 3 may be offloaded or split over devices (see `devices`): what one part of it says is brought to the device of
the image features before another part is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput, Sam3VisionEncoderOutput

from .devices import execution_device, loaded

SAM_PROMPTS = ("concept+text", "concept", "text", "box")
"""What of the VLM's reasoning may prompt SAM 3: the method itself first, then its ablations."""

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
"""SAM 3's parts that add up what their own children return, and so belong on one device."""

BOX_TEXT = "visual"
"""The word that stands in SAM 3's text where boxes alone say what is meant."""


@dataclass(frozen=True)
class ImageFeatures:
    """What SAM 3 knows of a batch of images before it is asked anything.

    Attributes:
        vision: SAM 3's feature pyramid and its position encodings.
        geometry_cls: (B, 1, D) CLS token of the geometry encoder, or None when the prompt goes without it.
    """

    vision: Sam3VisionEncoderOutput
    geometry_cls: Tensor | None

    def __len__(self) -> int:
        return self.vision.fpn_hidden_states[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.vision.fpn_hidden_states[0].device

    def select(self, rows: Tensor) -> ImageFeatures:
        """The features of some images, in the order of `rows` (N,); a row may be repeated."""
        rows = rows.to(self.device)
        return ImageFeatures(
            vision=Sam3VisionEncoderOutput(
                fpn_hidden_states=tuple(level[rows] for level in self.vision.fpn_hidden_states),
                fpn_position_encoding=tuple(level[rows] for level in self.vision.fpn_position_encoding),
            ),
            geometry_cls=None if self.geometry_cls is None else self.geometry_cls[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Several batches as one, in their order; they agree on having a `geometry_cls` or not."""
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
    """Encodes images.

    Args:
        sam: SAM 3.
        pixel_values: (B, 3, S, S) normalised pixels; S is SAM 3's image size.
        geometry_cls: Whether prompts on these images end with the geometry encoder's CLS token.
    """
    with loaded(sam):
        pixel_values = pixel_values.to(execution_device(sam))
        vision = sam.get_vision_features(pixel_values=pixel_values, return_dict=True)
    return ImageFeatures(vision, _geometry_cls(sam, vision) if geometry_cls else None)


def _geometry_cls(sam: Sam3Model, vision: Sam3VisionEncoderOutput) -> Tensor:
    """The geometry encoder's answer to "no box": a padded dummy box leaves only its CLS token valid."""
    nothing = vision.fpn_hidden_states[0].new_zeros(len(vision.fpn_hidden_states[0]), 1, 4)
    tokens, mask = box_tokens(sam, vision, nothing, valid=False)
    return tokens[mask][:, None]


def box_tokens(
    sam: Sam3Model, vision: Sam3VisionEncoderOutput, boxes: Tensor, valid: bool = True
) -> tuple[Tensor, Tensor]:
    """The geometry encoder's tokens of boxes.

    Args:
        sam: SAM 3.
        vision: Features of B images.
        boxes: (B, N, 4), see `decode`.
        valid: False for padding in the place of boxes.

    Returns:
        (B, N + 1, D) tokens, those of the boxes and then CLS, and their (B, N + 1) mask.
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
    """The children whose weights SAM 3 reads without calling them, which the hooks of Accelerate do not notice."""
    decoder = sam.detr_decoder
    return (
        sam.geometry_encoder.cls_embed,
        decoder.query_embed,
        decoder.reference_points,
        decoder.presence_token,
    )


def encode_text(sam: Sam3Model, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes phrases.

    Args:
        sam: SAM 3.
        input_ids: (B, T) tokens of SAM 3's tokenizer.
        attention_mask: (B, T), nonzero where there is a token.

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
    """Decodes one prompt per image; differentiable in the prompt.

    Args:
        sam: SAM 3.
        features: B encoded images.
        text_embeds: (B, T, D) explicit embeddings E_text, or None.
        text_mask: (B, T) their mask; required with `text_embeds`.
        concept_embeds: (B, L2, D) concept tokens Z, or None.
        boxes: (B, N, 4) boxes around what is meant, as (centre x, centre y, width, height) in shares of the image, or
            None.

    Returns:
        SAM 3's output: `semantic_seg` (B, 1, h, w) and `presence_logits` (B, 1) are what a concept mask is
        made of.

    Raises:
        ValueError: If neither concept tokens nor text embeddings are given, or these without their mask.
    """
    if text_embeds is not None and text_mask is None:
        raise ValueError("decode: text_embeds are given without text_mask; pass both.")
    if text_embeds is None and concept_embeds is None:
        raise ValueError(
            "decode: both text_embeds and concept_embeds are None; give at least one of them as the prompt."
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
