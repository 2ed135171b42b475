"""Tensor names of SAM 3 in other layouts: Meta's `sam3.pt`, the video model of Transformers, converted checkpoints.

Names are mapped to those of `Sam3Model` in Transformers. Meta fuses query, key and value into one tensor, stores the
position embedding of a class token that the detector does not use, and stores the text projection transposed.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Piece(NamedTuple):
    """A target tensor and the part of the source tensor that it is made from.

    Attributes:
        target: Name in `Sam3Model`.
        part: (i, n), the i-th of n equal parts along the first axis.
        operation: None, `"transpose"`, or `"drop_first"`, which drops the first entry of the second axis.
    """

    target: str
    part: tuple[int, int] = (0, 1)
    operation: str | None = None


# In the tables below, <n> is a number, <p> is "weight" or "bias", and <qkv> marks a fused tensor, for which Meta uses
# two names.
_ATTENTION = (
    ("{theirs}.in_proj_<p>", "{ours}.<qkv>.<p>"),
    ("{theirs}.out_proj.<p>", "{ours}.o_proj.<p>"),
)


def _attention(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    return tuple((a.format(theirs=theirs), b.format(ours=ours)) for a, b in _ATTENTION)


def _mlp(theirs: str, ours: str, count: int) -> tuple[tuple[str, str], ...]:
    """Names of an MLP, whose layers are numbered from 0 by Meta and from 1 by Transformers."""
    return tuple((f"{theirs}.layers.{i}.<p>", f"{ours}.layer{i + 1}.<p>") for i in range(count))


def _fusion_layer(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Names of a layer of the DETR encoder or the geometry encoder."""
    return (
        *_attention(f"{theirs}.self_attn", f"{ours}.self_attn"),
        *_attention(f"{theirs}.cross_attn_image", f"{ours}.cross_attn"),
        (f"{theirs}.linear<n>.<p>", f"{ours}.mlp.fc<n>.<p>"),
        (f"{theirs}.norm<n>.<p>", f"{ours}.layer_norm<n>.<p>"),
    )


_TRUNK, _VIT = "backbone.vision_backbone.trunk", "vision_encoder.backbone"
_CONVS, _NECK = "backbone.vision_backbone.convs.<n>", "vision_encoder.neck.fpn_layers.<n>"
_LANGUAGE, _TEXT = "backbone.language_backbone.encoder", "text_encoder.text_model"
_BLOCK, _TEXT_LAYER = f"{_LANGUAGE}.transformer.resblocks.<n>", f"{_TEXT}.encoder.layers.<n>"
_THEIR_LAYER, _LAYER = "transformer.decoder.layers.<n>", "detr_decoder.layers.<n>"

_META_NAMES: tuple[tuple[str, str], ...] = (
    # Vision transformer
    (f"{_TRUNK}.pos_embed", f"{_VIT}.embeddings.position_embeddings"),
    (f"{_TRUNK}.patch_embed.proj.<p>", f"{_VIT}.embeddings.patch_embeddings.projection.<p>"),
    (f"{_TRUNK}.ln_pre.<p>", f"{_VIT}.layer_norm.<p>"),
    (f"{_TRUNK}.blocks.<n>.attn.qkv.<p>", f"{_VIT}.layers.<n>.attention.<qkv>.<p>"),
    (f"{_TRUNK}.blocks.<n>.attn.proj.<p>", f"{_VIT}.layers.<n>.attention.o_proj.<p>"),
    (f"{_TRUNK}.blocks.<n>.norm<n>.<p>", f"{_VIT}.layers.<n>.layer_norm<n>.<p>"),
    (f"{_TRUNK}.blocks.<n>.mlp.fc<n>.<p>", f"{_VIT}.layers.<n>.mlp.fc<n>.<p>"),
    # Feature pyramid; upsampling by 4 consists of two layers with an activation between them
    (f"{_CONVS}.dconv_2x2.<p>", f"{_NECK}.scale_layers.0.<p>"),
    (f"{_CONVS}.dconv_2x2_0.<p>", f"{_NECK}.scale_layers.0.<p>"),
    (f"{_CONVS}.dconv_2x2_1.<p>", f"{_NECK}.scale_layers.2.<p>"),
    (f"{_CONVS}.conv_1x1.<p>", f"{_NECK}.proj1.<p>"),
    (f"{_CONVS}.conv_3x3.<p>", f"{_NECK}.proj2.<p>"),
    # Text encoder
    (f"{_LANGUAGE}.token_embedding.<p>", f"{_TEXT}.embeddings.token_embedding.<p>"),
    (f"{_LANGUAGE}.positional_embedding", f"{_TEXT}.embeddings.position_embedding.weight"),
    (f"{_LANGUAGE}.ln_final.<p>", f"{_TEXT}.final_layer_norm.<p>"),
    (f"{_LANGUAGE}.text_projection", "text_encoder.text_projection.weight"),
    (f"{_BLOCK}.attn.in_proj_<p>", f"{_TEXT_LAYER}.self_attn.<qkv>.<p>"),
    (f"{_BLOCK}.attn.out_proj.<p>", f"{_TEXT_LAYER}.self_attn.out_proj.<p>"),
    (f"{_BLOCK}.ln_<n>.<p>", f"{_TEXT_LAYER}.layer_norm<n>.<p>"),
    (f"{_BLOCK}.mlp.c_fc.<p>", f"{_TEXT_LAYER}.mlp.fc1.<p>"),
    (f"{_BLOCK}.mlp.c_proj.<p>", f"{_TEXT_LAYER}.mlp.fc2.<p>"),
    ("backbone.language_backbone.resizer.<p>", "text_projection.<p>"),
    # Geometry encoder
    *(
        (f"geometry_encoder.{name}.<p>", f"geometry_encoder.{name}.<p>")
        for name in (
            "boxes_direct_project",
            "boxes_pool_project",
            "boxes_pos_enc_project",
            "cls_embed",
            "label_embed",
            "final_proj",
        )
    ),
    ("geometry_encoder.norm.<p>", "geometry_encoder.prompt_layer_norm.<p>"),
    ("geometry_encoder.img_pre_norm.<p>", "geometry_encoder.vision_layer_norm.<p>"),
    ("geometry_encoder.encode_norm.<p>", "geometry_encoder.output_layer_norm.<p>"),
    *_fusion_layer("geometry_encoder.encode.<n>", "geometry_encoder.layers.<n>"),
    # DETR encoder and decoder
    *_fusion_layer("transformer.encoder.layers.<n>", "detr_encoder.layers.<n>"),
    *_attention(f"{_THEIR_LAYER}.self_attn", f"{_LAYER}.self_attn"),
    *_attention(f"{_THEIR_LAYER}.ca_text", f"{_LAYER}.text_cross_attn"),
    *_attention(f"{_THEIR_LAYER}.cross_attn", f"{_LAYER}.vision_cross_attn"),
    (f"{_THEIR_LAYER}.norm1.<p>", f"{_LAYER}.vision_cross_attn_layer_norm.<p>"),
    (f"{_THEIR_LAYER}.norm2.<p>", f"{_LAYER}.self_attn_layer_norm.<p>"),
    (f"{_THEIR_LAYER}.norm3.<p>", f"{_LAYER}.mlp_layer_norm.<p>"),
    (f"{_THEIR_LAYER}.catext_norm.<p>", f"{_LAYER}.text_cross_attn_layer_norm.<p>"),
    (f"{_THEIR_LAYER}.linear<n>.<p>", f"{_LAYER}.mlp.fc<n>.<p>"),
    ("transformer.decoder.norm.<p>", "detr_decoder.output_layer_norm.<p>"),
    ("transformer.decoder.presence_token.<p>", "detr_decoder.presence_token.<p>"),
    ("transformer.decoder.presence_token_out_norm.<p>", "detr_decoder.presence_layer_norm.<p>"),
    ("transformer.decoder.query_embed.<p>", "detr_decoder.query_embed.<p>"),
    ("transformer.decoder.reference_points.<p>", "detr_decoder.reference_points.<p>"),
    *_mlp("transformer.decoder.bbox_embed", "detr_decoder.box_head", 3),
    *_mlp("transformer.decoder.presence_token_head", "detr_decoder.presence_head", 3),
    *_mlp("transformer.decoder.ref_point_head", "detr_decoder.ref_point_head", 2),
    *_mlp("transformer.decoder.boxRPB_embed_x", "detr_decoder.box_rpb_embed_x", 2),
    *_mlp("transformer.decoder.boxRPB_embed_y", "detr_decoder.box_rpb_embed_y", 2),
    # Scores and masks
    *_mlp("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp", 2),
    ("dot_prod_scoring.prompt_mlp.out_norm.<p>", "dot_product_scoring.text_mlp_out_norm.<p>"),
    ("dot_prod_scoring.prompt_proj.<p>", "dot_product_scoring.text_proj.<p>"),
    ("dot_prod_scoring.hs_proj.<p>", "dot_product_scoring.query_proj.<p>"),
    *_attention("segmentation_head.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
    ("segmentation_head.cross_attn_norm.<p>", "mask_decoder.prompt_cross_attn_norm.<p>"),
    ("segmentation_head.instance_seg_head.<p>", "mask_decoder.instance_projection.<p>"),
    ("segmentation_head.semantic_seg_head.<p>", "mask_decoder.semantic_projection.<p>"),
    (
        "segmentation_head.mask_predictor.mask_embed.layers.<n>.<p>",
        "mask_decoder.mask_embedder.layers.<n>.<p>",
    ),
    (
        "segmentation_head.pixel_decoder.conv_layers.<n>.<p>",
        "mask_decoder.pixel_decoder.conv_layers.<n>.<p>",
    ),
    ("segmentation_head.pixel_decoder.norms.<n>.<p>", "mask_decoder.pixel_decoder.norms.<n>.<p>"),
)
_META_OPERATIONS = {
    f"{_TRUNK}.pos_embed": "drop_first",
    f"{_LANGUAGE}.text_projection": "transpose",
}
# Tensors of the tracker and of point prompts, which our model does not have, and computed buffers.
_META_IGNORED = re.compile(
    r"backbone\.vision_backbone\.sam2_convs\.|geometry_encoder\.points_|inst_interactive_predictor\.|.*\.freqs_cis$"
)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace("<n>", r"(\d+)").replace("<p>", "(weight|bias)"))


_META_RULES = tuple((_compile(theirs), ours, _META_OPERATIONS.get(theirs)) for theirs, ours in _META_NAMES)


def from_meta(name: str) -> tuple[Piece, ...] | None:
    """Map the name of a tensor of `sam3.pt` to pieces: `()` if our model does not use it, None if it is unknown."""
    if name.startswith("tracker."):
        return ()
    name = name.removeprefix("detector.")
    if _META_IGNORED.match(name):
        return ()
    for pattern, ours, operation in _META_RULES:
        if match := pattern.fullmatch(name):
            target = _fill(ours, match.groups())
            if "<qkv>" not in target:
                return (Piece(target, operation=operation),)
            parts = ("q_proj", "k_proj", "v_proj")
            return tuple(
                Piece(target.replace("<qkv>", part), (i, len(parts))) for i, part in enumerate(parts)
            )
    return None


def from_transformers(name: str) -> tuple[Piece, ...] | None:
    """Map the name of a tensor in Transformers' layout, of the image model or the video model that contains it."""
    if name.startswith(("tracker_model.", "tracker_neck.")):
        return ()
    return (Piece(name.removeprefix("detector_model.")),)


def from_ours(name: str) -> tuple[Piece, ...] | None:
    """Map the name of a tensor of a converted checkpoint; `()` for the VLM and the CTM."""
    return (Piece(name.removeprefix("sam.")),) if name.startswith("sam.") else ()


def _fill(template: str, values: tuple[str, ...]) -> str:
    """Replace the placeholders <n> and <p> by the matched values in order."""
    remaining = iter(values)
    return re.sub("<[np]>", lambda _: next(remaining), template)
