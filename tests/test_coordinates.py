"""Tests of coordinate transforms between image pixels, text coordinates and SAM 3's format."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg_hf import format_completion, parse_completion
from conceptseg_hf.coordinates import CoordinateFrame
from conceptseg_hf.mosaic import MosaicLayout, assign_cells


@st.composite
def boxes_in(draw: st.DrawFn, size: tuple[int, int]) -> tuple[float, float, float, float]:
    x = sorted(draw(st.lists(st.floats(0, size[0]), min_size=2, max_size=2)))
    y = sorted(draw(st.lists(st.floats(0, size[1]), min_size=2, max_size=2)))
    return x[0], y[0], x[1], y[1]


sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
scales = st.sampled_from([1.0, 64.0, 100.0, 600.0])


@settings(deadline=None, max_examples=200)
@given(sizes, scales, st.data())
def test_target_box_round_trip(size: tuple[int, int], scale: float, data: st.DataObject) -> None:
    frame = CoordinateFrame(size, coordinate_scale=scale)
    box = data.draw(boxes_in(size))
    text_box = frame.image_box_to_text(box)
    assert min(text_box) >= 0 and max(text_box) <= scale * (1 + 1e-12)
    np.testing.assert_allclose(frame.text_box_to_image(text_box), box, rtol=1e-9, atol=1e-6)
    cx, cy, width, height = frame.text_box_to_sam(text_box)
    corners = np.array([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    np.testing.assert_allclose(corners * np.tile(frame.image_size, 2), box, atol=1e-6)
    # The round trip through a formatted completion is exact up to half a text unit.
    completion = parse_completion(format_completion("", "", None, text_box, "x", scale), scale)
    unit = 1 if scale > 1 else 0.001
    back = frame.text_box_to_image(completion.bbox)
    for side in (0, 1):
        np.testing.assert_allclose(back[side::2], box[side::2], atol=size[side] * unit / scale / 2 + 1e-6)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 9), scales, st.data())
def test_reference_box_round_trip(count: int, scale: float, data: st.DataObject) -> None:
    proxy = data.draw(st.one_of(st.none(), st.integers(0, count - 1))) if count > 1 else None
    grid = 1 if count == 1 else 2 if count <= 4 else 3
    reference_sizes = tuple(data.draw(sizes) for _ in range(count))
    frame = CoordinateFrame(
        (90, 60),
        reference_sizes,
        MosaicLayout(grid, 64),
        assign_cells(count, proxy),
        proxy,
        canvas_size=64,
        coordinate_scale=scale,
    )
    index = data.draw(st.integers(0, count - 1))
    width, height = reference_sizes[index]
    box = data.draw(boxes_in((width, height)))
    text_box = frame.reference_box_to_text(box, index)
    reference, back = frame.text_box_to_reference(text_box)
    center_on_edge = (box[0] + box[2]) / 2 > width * (1 - 1e-9) or (box[1] + box[3]) / 2 > height * (1 - 1e-9)
    if not center_on_edge:  # an empty box on the right or bottom edge also belongs to the next cell
        assert reference == index
        np.testing.assert_allclose(back, box, rtol=1e-9, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(sizes, st.sampled_from([1.0, 600.0]), st.data())
def test_inclusive_corners_round_trip(size: tuple[int, int], scale: float, data: st.DataObject) -> None:
    """Boxes smaller than a canvas pixel are excluded, since the text cannot represent them."""
    frame = CoordinateFrame(size, coordinate_scale=scale, inclusive_corners=True)
    box = data.draw(boxes_in(size))
    text_box = frame.image_box_to_text(box)
    pixel = np.asarray(size) / frame.canvas_size
    for side in (0, 1):
        if box[side + 2] - box[side] >= pixel[side] and any(text_box):
            np.testing.assert_allclose(
                frame.text_box_to_image(text_box)[side::2], box[side::2], rtol=1e-9, atol=1e-6
            )
    assert frame.text_box_to_image((0, 0, 0, 0)) == (0, 0, 0, 0)
