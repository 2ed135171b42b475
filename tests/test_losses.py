from __future__ import annotations

import pytest
import torch

from conceptseg_hf.losses import dice_loss, focal_loss, segmentation_loss


def test_dice_matches_the_formula():
    logits = torch.tensor([[[0.0, 100.0], [-100.0, 100.0]]])
    labels = torch.tensor([[[1, 1], [0, 0]]])
    # probabilities .5, 1, 0, 1: overlap 1.5, sums 2.5 and 2
    assert dice_loss(logits, labels).item() == pytest.approx(1 - (2 * 1.5 + 1) / (2.5 + 2 + 1))


def test_focal_matches_the_formula_and_reduces_to_cross_entropy():
    logits, labels = torch.randn(2, 5, 5), torch.rand(2, 5, 5) > 0.5
    p = logits.sigmoid()
    p_true = torch.where(labels, p, 1 - p)
    weight = torch.where(labels, 0.25, 0.75)
    assert torch.allclose(focal_loss(logits, labels), (-weight * (1 - p_true) ** 2 * p_true.log()).mean())
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.allclose(focal_loss(logits, labels, alpha=-1, gamma=0), cross_entropy)


def test_perfect_and_opposite_predictions():
    labels = torch.zeros(2, 8, 8)
    labels[:, :4] = 1
    logits = (labels * 2 - 1)[:, None] * 50
    assert segmentation_loss(logits, labels)[0].item() == pytest.approx(0, abs=1e-4)
    assert segmentation_loss(-logits, labels)[1].item() > 0.9


def test_loss_of_an_empty_prediction_for_an_empty_mask_is_zero():
    labels = torch.zeros(1, 8, 8)
    assert segmentation_loss(torch.full((1, 1, 8, 8), -50.0), labels)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_logits_are_resized_to_the_labels(dtype):
    logits = torch.randn(3, 1, 8, 8, requires_grad=True)
    labels = (torch.rand(3, 30, 17) > 0.5).to(dtype)
    loss, dice, focal = segmentation_loss(logits, labels)
    assert torch.allclose(loss, dice + focal)
    assert torch.equal(loss, segmentation_loss(logits, labels[:, None])[0])
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_ignored_pixels_do_not_count():
    logits, labels = torch.randn(2, 1, 6, 8), torch.rand(2, 6, 8) > 0.5
    ignore = torch.zeros(2, 6, 8, dtype=torch.bool)
    ignore[..., 5:] = True
    expected = segmentation_loss(logits[..., :5], labels[..., :5])
    for pair in zip(segmentation_loss(logits, labels, ignore=ignore), expected, strict=True):
        torch.testing.assert_close(*pair)
    assert segmentation_loss(logits, labels, ignore=torch.ones_like(ignore))[0].item() == 0


def test_is_computed_in_float32():
    logits, labels = torch.randn(1, 1, 4, 4, dtype=torch.bfloat16), torch.ones(1, 4, 4)
    assert segmentation_loss(logits, labels)[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 8, 8), (8, 8)])
def test_rejects_labels_of_another_shape(shape):
    with pytest.raises(ValueError, match="mask per row"):
        segmentation_loss(torch.zeros(2, 1, 8, 8), torch.zeros(shape))
