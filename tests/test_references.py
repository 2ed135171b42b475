"""Tests of the mosaic geometry and of the resolution of boxes, masks and roles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptseg_hf.boxes import box_iou, mask_to_box
from conceptseg_hf.mosaic import MosaicLayout, assign_cells, compose_mosaic, grid_size
from conceptseg_hf.references import Reference, find_proxy, resolve_references

RED = (255, 0, 0)
IMAGE = Image.new("RGB", (40, 30), "blue")


@st.composite
def layouts(draw: st.DrawFn) -> MosaicLayout:
    return MosaicLayout(draw(st.integers(1, 3)), draw(st.integers(3, 1000)))


@st.composite
def boxes_in(draw: st.DrawFn, size: tuple[int, int]) -> tuple[float, float, float, float]:
    x = sorted(draw(st.lists(st.floats(0, size[0]), min_size=2, max_size=2)))
    y = sorted(draw(st.lists(st.floats(0, size[1]), min_size=2, max_size=2)))
    return x[0], y[0], x[1], y[1]


@pytest.mark.parametrize(("count", "side"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (9, 3)])
def test_grid_size(count: int, side: int) -> None:
    assert grid_size(count) == side


@pytest.mark.parametrize("count", [0, 10])
def test_grid_size_rejects_invalid_counts(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} were given, but a mosaic holds at most 9"):
        grid_size(count)


@settings(deadline=None, max_examples=100)
@given(layouts())
def test_cells_tile_the_canvas(layout: MosaicLayout) -> None:
    covered = np.zeros((layout.canvas_size, layout.canvas_size), dtype=int)
    for index in range(layout.grid**2):
        left, top, right, bottom = layout.cell(index)
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


@settings(deadline=None, max_examples=200)
@given(layouts(), st.data())
def test_image_canvas_round_trip(layout: MosaicLayout, data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
    index = data.draw(st.integers(0, layout.grid**2 - 1))
    box = data.draw(boxes_in(size))
    canvas = layout.image_to_canvas(box, index, size)
    left, top, right, bottom = layout.cell(index)
    assert left - 1e-9 <= canvas[0] <= canvas[2] <= right + 1e-9
    assert top - 1e-9 <= canvas[1] <= canvas[3] <= bottom + 1e-9
    np.testing.assert_allclose(layout.canvas_to_image(canvas, index, size), box, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(layouts(), st.data())
def test_cell_at_finds_the_cell(layout: MosaicLayout, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, layout.grid**2 - 1))
    left, top, right, bottom = layout.cell(index)
    x, y = data.draw(st.integers(left, right - 1)), data.draw(st.integers(top, bottom - 1))
    assert layout.cell_at((x, y, x + 1, y + 1)) == index


def test_cell_at_outside_the_canvas_is_the_nearest_cell() -> None:
    layout = MosaicLayout(2, 100)
    assert layout.cell_at((-50, -50, -40, -40)) == 0
    assert layout.cell_at((200, -50, 300, -40)) == 1
    assert layout.cell_at((200, 200, 300, 300)) == 3


@pytest.mark.parametrize(("grid", "size"), [(0, 10), (3, 2)])
def test_layout_rejects_invalid_sizes(grid: int, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        MosaicLayout(grid, size)


def test_cell_out_of_range() -> None:
    with pytest.raises(ValueError, match="no cell 4 in a 2 x 2 grid"):
        MosaicLayout(2, 10).cell(4)


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_assign_cells(count: int, data: st.DataObject) -> None:
    assert assign_cells(count, None) == tuple(range(count))
    proxy = data.draw(st.integers(0, count - 1))
    cells = assign_cells(count, proxy)
    assert cells[proxy] == 0 and sorted(cells) == list(range(count))
    others = [cell for index, cell in enumerate(cells) if index != proxy]
    assert others == sorted(others)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_mask_to_box_inverts_painting(width: int, height: int, data: st.DataObject) -> None:
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    assert mask_to_box(mask) == (x1, y1, x2, y2)
    # Disconnected pixels have a common box.
    assert mask_to_box(np.eye(5)[:, :4]) == (0, 0, 4, 4)


def test_mask_to_box_of_an_empty_mask() -> None:
    assert mask_to_box(np.zeros((4, 5))) is None


def test_box_iou() -> None:
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0
    assert box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


BOX = (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("roles", "boxed", "proxy"),
    [
        (["auto"], [True], None),
        (["auto", "auto"], [True, True], 0),
        (["auto", "auto"], [True, False], None),
        (["auto", "auto", "auto"], [False, True, True], 1),
        (["support", "auto", "auto"], [True, True, True], 1),
        (["support", "support"], [True, True], None),
        (["auto", "proxy"], [True, True], 1),
        (["auto", "proxy"], [True, False], 1),
        (["auto", "auto"], [False, False], None),
    ],
)
def test_find_proxy(roles: list, boxed: list, proxy: int | None) -> None:
    assert find_proxy(roles, [BOX if has else None for has in boxed]) == proxy


def test_rejects_more_than_one_proxy() -> None:
    with pytest.raises(ValueError, match=r"references \[0, 2\] all have the role 'proxy'"):
        find_proxy(["proxy", "auto", "proxy"], [BOX] * 3)


def test_rejects_a_proxy_without_support() -> None:
    with pytest.raises(ValueError, match="proxy query without support"):
        find_proxy(["proxy"], [BOX])


def test_rejects_an_unknown_role() -> None:
    with pytest.raises(ValueError, match="role is 'query'"):
        Reference(IMAGE, role="query")


def test_resolve_reads_masks_boxes_and_mappings() -> None:
    mask = np.zeros((30, 40), dtype=bool)
    mask[3:9, 5:20] = True
    resolved = resolve_references(
        [
            Reference(IMAGE, mask=mask),
            {"image": IMAGE, "box": [-5, 2, 10, 99]},
            Reference(IMAGE),
            Reference(IMAGE, mask=mask, box=BOX),
        ]
    )
    assert resolved.boxes == ((5, 3, 20, 9), (0, 2, 10, 30), None, BOX)
    assert resolved.proxy == 0
    assert [image.size for image in resolved.images] == [(40, 30)] * 4


def test_boxes_of_one_pixel_are_not_mistaken_for_normalized_boxes() -> None:
    for image, box in ((IMAGE, (0, 0, 1, 1)), (Image.new("RGB", (1, 1)), (0.2, 0, 1, 0.7))):
        assert resolve_references([Reference(image, box=box)]).boxes == (box,)


def test_resolve_an_empty_list() -> None:
    assert resolve_references([]).images == ()


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (Reference(IMAGE), "pass a list of Reference objects"),
        ([IMAGE], r"reference 0 is a Image; pass Reference\("),
        ([{"picture": 1}], r"reference 0 has the fields \['picture'\]"),
        ([Reference(IMAGE), Reference("nowhere.png")], "reference 1: image 'nowhere.png' is not a file"),
        ([Reference(IMAGE, mask=np.zeros((30, 40)))], "reference 0: mask has no foreground pixel"),
        (
            [Reference(IMAGE, mask=np.ones((3, 4)))],
            "reference 0: mask has 4 x 3 pixels, but its image has 40 x 30",
        ),
        ([Reference(IMAGE, box=(1, 2, 3))], r"reference 0: box is \(1, 2, 3\); use four numbers"),
        ([Reference(IMAGE, box="abcd")], "reference 0: box is 'abcd'; use four numbers"),
        ([Reference(IMAGE, box=(5, 2, 5, 9))], "with x1 < x2 and y1 < y2"),
        ([Reference(IMAGE, box=(0, 0, float("nan"), 9))], "with x1 < x2 and y1 < y2"),
        ([Reference(IMAGE, box=(50, 0, 60, 9))], "lies outside its image of 40 x 30 pixels"),
        (
            [Reference(IMAGE, box=(0.1, 0, 0.5, 1))],
            "within one pixel of its image of 40 x 30 pixels and appears",
        ),
        ([Reference(IMAGE)] * 10, "10 were given, but a mosaic holds at most 9"),
    ],
)
def test_resolve_rejects_invalid_references(references: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        resolve_references(references)
    assert str(caught.value).endswith(".")


def plain(color: str) -> Image.Image:
    return Image.new("RGB", (40, 30), color)


def test_mosaic_places_references_and_draws_support_boxes_only() -> None:
    box = (10.0, 5.0, 30.0, 25.0)
    layout = MosaicLayout(2, 120)
    images = [plain("blue"), plain("lime"), plain("white")]
    mosaic = np.asarray(compose_mosaic(images, [box, box, None], layout, proxy=1))
    assert mosaic.shape == (120, 120, 3)
    # The proxy (lime) is in cell 0 without a box, blue in cell 1 with its box, and white in cell 2; cell 3 is empty.
    assert (mosaic[:60, :60] == (0, 255, 0)).all()
    assert (mosaic[60:, :60] == 255).all()
    assert (mosaic[60:, 60:] == 0).all()
    red = (mosaic == RED).all(-1)
    assert red[:60, 60:].any() and red.sum() == red[:60, 60:].sum()
    assert mask_to_box(red) == tuple(map(int, layout.image_to_canvas(box, 1, (40, 30))))


@pytest.mark.parametrize(("canvas_size", "width"), [(600, 2), (112, 1), (1200, 4)])
def test_line_width_scales_with_the_canvas(canvas_size: int, width: int) -> None:
    mosaic = np.asarray(
        compose_mosaic([plain("blue")], [(10.0, 5.0, 30.0, 25.0)], MosaicLayout(1, canvas_size))
    )
    row = (mosaic[canvas_size // 2] == RED).all(-1)
    assert row.sum() == 2 * width


def test_full_image_box_and_tiny_box_are_drawn() -> None:
    mosaic = np.asarray(compose_mosaic([plain("blue")], [(0.0, 0.0, 40.0, 30.0)], MosaicLayout(1, 60)))
    assert mask_to_box((mosaic == RED).all(-1)) == (0, 0, 60, 60)
    mosaic = np.asarray(compose_mosaic([plain("blue")], [(3.0, 3.0, 3.01, 3.01)], MosaicLayout(1, 60)))
    assert (mosaic == RED).all(-1).any()
