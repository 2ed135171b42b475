from __future__ import annotations

import pytest
import torch
from transformers import Sam3Model

from conceptseg_hf import ConceptSegConfig
from conceptseg_hf.sam_prompt import ImageFeatures, decode, encode_image, encode_text


@pytest.fixture(scope="module")
def sam() -> Sam3Model:
    torch.manual_seed(0)
    model = (
        Sam3Model._from_config(ConceptSegConfig.from_preset("nano").sam_config).eval().requires_grad_(False)
    )
    for parameter in model.parameters():
        if parameter.dim() < 2:
            # With the constant initialization of biases and norms, some errors would not be detected.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(3, 100, (2, 6)), "attention_mask": mask}


def test_geometry_cls_equals_sam_with_one_padded_box(sam: Sam3Model, prompt: dict[str, torch.Tensor]) -> None:
    pixels = torch.randn(2, 3, 128, 128)
    output = decode(sam, encode_image(sam, pixels), *encode_text(sam, **prompt))
    padded_box = {"input_boxes": torch.zeros(2, 1, 4), "input_boxes_labels": torch.full((2, 1), -10)}
    expected = sam(pixel_values=pixels, **prompt, **padded_box)
    for name in ("semantic_seg", "presence_logits", "pred_masks", "pred_logits", "pred_boxes"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_boxes_equal_box_prompts_of_transformers(sam: Sam3Model, prompt: dict[str, torch.Tensor]) -> None:
    pixels = torch.randn(2, 3, 128, 128)
    boxes = torch.tensor([[[0.5, 0.4, 0.3, 0.2]], [[0.2, 0.6, 0.3, 0.5]]])
    features = encode_image(sam, pixels)
    output = decode(sam, features, *encode_text(sam, **prompt), boxes=boxes)
    expected = sam(pixel_values=pixels, **prompt, input_boxes=boxes)
    for name in ("semantic_seg", "presence_logits", "pred_masks"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    other = decode(sam, features, *encode_text(sam, **prompt), boxes=boxes.flip(0))
    assert (other.semantic_seg - output.semantic_seg).abs().max() > 1e-3


def test_without_geometry_cls_equals_transformers(sam: Sam3Model, prompt: dict[str, torch.Tensor]) -> None:
    pixels = torch.randn(2, 3, 128, 128)
    plain = sam(pixel_values=pixels, **prompt)
    without = decode(sam, encode_image(sam, pixels, geometry_cls=False), *encode_text(sam, **prompt))
    torch.testing.assert_close(without.semantic_seg, plain.semantic_seg, rtol=1e-4, atol=1e-5)
    with_cls = decode(sam, encode_image(sam, pixels), *encode_text(sam, **prompt))
    assert (with_cls.semantic_seg - plain.semantic_seg).abs().max() > 1e-3  # the setting has an effect


def test_only_concept_tokens_have_gradients(sam: Sam3Model, prompt: dict[str, torch.Tensor]) -> None:
    concepts = torch.randn(2, 3, 64, requires_grad=True)
    output = decode(
        sam, encode_image(sam, torch.randn(2, 3, 128, 128)), *encode_text(sam, **prompt), concepts
    )
    (output.semantic_seg.sum() + output.presence_logits.sum()).backward()
    assert concepts.grad is not None and (concepts.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad is None for parameter in sam.parameters())


def test_decoding_selected_rows_equals_decoding_them_alone(
    sam: Sam3Model, prompt: dict[str, torch.Tensor]
) -> None:
    features = encode_image(sam, torch.randn(2, 3, 128, 128))
    text, mask = encode_text(sam, **prompt)
    together = decode(
        sam, features.select(torch.tensor([1, 0, 1])), text[[0, 0, 1]], mask[[0, 0, 1]]
    ).semantic_seg
    alone = decode(sam, features.select(torch.tensor([1])), text[1:], mask[1:]).semantic_seg
    assert len(features) == 2
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("geometry_cls", [True, False])
def test_concatenate_inverts_select(sam: Sam3Model, geometry_cls: bool) -> None:
    whole = encode_image(sam, torch.randn(3, 3, 128, 128), geometry_cls)
    parts = [whole.select(torch.tensor(rows)) for rows in ([0], [1, 2])]
    again = ImageFeatures.concatenate(parts)
    assert len(again) == 3
    for output, expected in zip(
        (*again.vision.fpn_hidden_states, *again.vision.fpn_position_encoding),
        (*whole.vision.fpn_hidden_states, *whole.vision.fpn_position_encoding),
        strict=True,
    ):
        assert torch.equal(output, expected)
    assert torch.equal(again.geometry_cls, whole.geometry_cls) if geometry_cls else again.geometry_cls is None


def test_rejects_an_empty_prompt(sam: Sam3Model) -> None:
    with pytest.raises(ValueError, match="both text_embeds and concept_embeds are None"):
        decode(sam, encode_image(sam, torch.randn(1, 3, 128, 128)))


@pytest.mark.parametrize("geometry_cls", [True, False])
def test_repeated_images_are_those_of_select(sam: Sam3Model, geometry_cls: bool) -> None:
    features = encode_image(sam, torch.randn(2, 3, 128, 128), geometry_cls)
    repeated, selected = features.repeat(2), features.select(torch.tensor([0, 0, 1, 1]))
    for output, expected in zip(
        (*repeated.vision.fpn_hidden_states, *repeated.vision.fpn_position_encoding),
        (*selected.vision.fpn_hidden_states, *selected.vision.fpn_position_encoding),
        strict=True,
    ):
        assert torch.equal(output, expected)
    if geometry_cls:
        assert torch.equal(repeated.geometry_cls, selected.geometry_cls)
    else:
        assert repeated.geometry_cls is None
