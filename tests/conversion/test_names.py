from __future__ import annotations

import pytest

from conceptseg_hf import ConceptSegConfig
from conceptseg_hf.conversion import names, sam3
from conceptseg_hf.conversion.plan import expected_tensors


@pytest.fixture(scope="module")
def ours():
    return list(expected_tensors(ConceptSegConfig.from_preset("nano"))[0])


def test_names_round_trip(ours):
    kept = [name for name in ours if not name.startswith("sam.")]
    theirs = [names.to_original(name) for name in kept]
    assert len(set(theirs)) == len(kept) > 150
    assert [names.from_original(name) for name in theirs] == kept
    prefixes = {name.split(".")[0] for name in theirs}
    assert prefixes == {"model", "visual", "learnable_query", "connector", "proj_to_sam"}
    assert not [name for name in theirs if name.startswith(("model.visual", "model.language_model"))]


def test_sam_is_not_part_of_the_authors_layout(ours):
    assert {names.to_original(name) for name in ours if name.startswith("sam.")} == {None}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.3.self_attn.q_proj.bias", "vlm.model.language_model.layers.3.self_attn.q_proj.bias"),
        ("model.embed_tokens.weight", "vlm.model.language_model.embed_tokens.weight"),
        ("visual.merger.mlp.2.bias", "vlm.model.visual.merger.mlp.2.bias"),
        ("lm_head.weight", "vlm.lm_head.weight"),
        ("learnable_query.param.weight", "ctm.queries"),
        ("connector.pos_embed", "ctm.position_embedding"),
        ("connector.blocks.2.norm1.weight", "ctm.blocks.2.norm_states.weight"),
        ("connector.blocks.0.attn.kv.bias", "ctm.blocks.0.attn.kv.bias"),
        ("proj_to_sam.2.weight", "ctm.proj_to_sam.2.weight"),
    ],
)
def test_known_names(theirs, ours):
    assert names.from_original(theirs) == ours and names.to_original(ours) == theirs


def test_names_in_the_original_format_of_the_vlm():
    assert names.to_original("vlm.model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert names.to_original("vlm.visual.blocks.0.norm1.weight") == "visual.blocks.0.norm1.weight"


@pytest.mark.parametrize("name", ["optimizer.step", "connector.blocks.x.norm0.weight", "sam.x", "", "vlm"])
def test_unknown_names(name):
    assert names.from_original(name) is None


def test_fused_tensor_is_split_in_three():
    pieces = sam3.from_meta("detector.transformer.encoder.layers.4.self_attn.in_proj_weight")
    assert [(piece.target, piece.part) for piece in pieces] == [
        (f"detr_encoder.layers.4.self_attn.{part}_proj.weight", (i, 3)) for i, part in enumerate("qkv")
    ]


def test_unused_and_unknown_tensors_of_sam():
    for name in (
        "tracker.maskmem_backbone.out_proj.weight",
        "detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.weight",
        "detector.geometry_encoder.points_direct_project.weight",
        "detector.backbone.vision_backbone.trunk.blocks.3.attn.freqs_cis",
    ):
        assert sam3.from_meta(name) == ()
    assert sam3.from_meta("detector.something.new.weight") is None
    assert sam3.from_transformers("tracker_model.x") == ()
    assert sam3.from_transformers("detector_model.text_projection.bias")[0].target == "text_projection.bias"
    assert sam3.from_ours("vlm.lm_head.weight") == ()
