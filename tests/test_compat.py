from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import conceptseg_hf  # noqa: F401  (makes torchvision importable)
from conceptseg_hf._compat import roi_align


def reference(features, rois, *options):
    """RoIAlign of torchvision: the compiled operator, or else the fallback that it compiles on the first call."""
    if importlib.import_module("torchvision.extension")._has_ops():
        scale, height, width, ratio, aligned = options
        return torch.ops.torchvision.roi_align(features, rois, scale, height, width, ratio, aligned)
    source = importlib.util.find_spec("torchvision.ops.roi_align")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module._roi_align.__wrapped__(features, rois, *options)


@given(
    seed=st.integers(0, 2**16),
    bins=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ratio=st.sampled_from([-1, 1, 3]),
    aligned=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_roi_align_is_that_of_torchvision(seed, bins, ratio, aligned, scale):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 4, 9, 12, generator=generator, dtype=torch.float32, requires_grad=True)
    corners = torch.rand(5, 2, 2, generator=generator).sort(1).values
    # Beyond the image, the fallback repeats the border, where the compiled operator has zeros.
    rois = (corners * torch.tensor([11.0, 8.0]) / scale).flatten(1)
    rois = torch.cat([torch.tensor([[0.0], [2.0], [1.0], [1.0], [0.0]]), rois], dim=1)
    options = (scale, *bins, ratio, aligned)
    pooled, expected = roi_align(features, rois, *options), reference(features, rois, *options)
    assert pooled.shape == (5, 4, *bins)
    assert torch.allclose(pooled, expected, atol=1e-5)
    weights = torch.randn(pooled.shape, generator=generator)
    gradients = [torch.autograd.grad((output * weights).sum(), features)[0] for output in (pooled, expected)]
    assert torch.allclose(*gradients, atol=1e-4)


def test_box_without_extent_has_no_points():
    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    pooled = roi_align(features, torch.tensor([[0.0, 2, 2, 2, 3]]), 1.0, 1, 1, -1, True)
    assert pooled.item() == 0
    assert torch.autograd.grad(pooled.sum(), features)[0].abs().sum() == 0


def test_points_far_outside_the_image_are_zero():
    features = torch.ones(1, 1, 4, 4)
    inside, half, outside = roi_align(
        features,
        torch.tensor([[0, 0, 0, 4, 4], [0, 0, 0, 12, 4], [0, 20, 20, 24, 24]], dtype=torch.float32),
        1.0,
        1,
        2,
        -1,
        False,
    ).flatten(1)
    assert inside.tolist() == [1, 1]
    assert half.tolist() == pytest.approx([4 / 6, 0])
    assert outside.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(dtype):
    features = torch.randn(1, 2, 6, 6)
    rois = torch.tensor([[0.0, 1, 1, 5, 4]])
    pooled = roi_align(features.to(dtype), rois.to(dtype), 1.0, 3, 3, -1, False)
    assert pooled.dtype == dtype
    assert torch.allclose(pooled.float(), roi_align(features, rois, 1.0, 3, 3, -1, False), atol=0.05)


def test_no_regions():
    assert roi_align(torch.ones(1, 2, 6, 6), torch.zeros(0, 5), 1.0, 3, 3, -1, False).shape == (0, 2, 3, 3)
