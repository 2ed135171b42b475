"""Tests of the mosaic with the released settings, and of several boxes per reference; compared with plain Pillow."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conceptseg_hf import Reference
from conceptseg_hf.boxes import enclosing_box
from conceptseg_hf.mosaic import MosaicSettings, compose_mosaic, make_layout
from conceptseg_hf.references import resolve_references

RED = (255, 0, 0)
RELEASED = MosaicSettings(
    grid=2,
    resampling="bilinear",
    boxes_from="cell",
    corners="inclusive",
    mark_single=False,
    several_boxes="enclosing",
)
CELLS = [(0, 0), (300, 0), (0, 300), (300, 300)]  # (left, top) of each cell on a canvas of 600


@pytest.fixture()
def released(processor):
    return processor.with_settings(canvas_size=600, coordinate_scale=600.0, mosaic=RELEASED)


def noise_image(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def masked(seed: int, box: tuple[int, int, int, int], size: tuple[int, int] = (640, 480)) -> Reference:
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return Reference(noise_image(seed, size), mask=Image.fromarray(mask))


def box_in_cell(reference: Reference, cell: int) -> list[int]:
    """The box of the released code: first and last nonzero pixel of the mask, resized to 300 x 300 (bilinear)."""
    small = np.asarray(reference.mask.resize((300, 300), Image.Resampling.BILINEAR))
    rows, columns = np.nonzero(small)
    left, top = CELLS[cell]
    return [
        int(columns.min()) + left,
        int(rows.min()) + top,
        int(columns.max()) + left,
        int(rows.max()) + top,
    ]


def listed_boxes(processor, frame, prompt="red circle") -> list[list[int]]:
    """Parse the list of boxes in the instruction of a minimal template."""
    template = dict.fromkeys(
        ("with_proxy", "support_only", "single_reference", "no_reference"), "{problem} {reference_box_list}"
    )
    text = processor.with_settings(prompt_template={"system": "", **template}).instruction(prompt, frame)
    (box_list,) = re.findall(r"\[\[.*\]\]|\[\]", text)
    return json.loads(box_list)


def test_four_references_with_masks_as_released(released):
    references = [
        masked(1, (100, 40, 333, 199)),
        masked(2, (7, 11, 61, 471)),
        masked(3, (500, 300, 640, 480)),
        masked(4, (320, 240, 321, 241)),
    ]
    frame, (mosaic, _) = released.draw_images(noise_image(0), references)
    boxes = [box_in_cell(reference, cell) for cell, reference in enumerate(references)]
    assert listed_boxes(released, frame) == boxes[1:]
    # Each cell pixel is a weighted mean of mask pixels within 640 / 300 = 2.13 of its center. The first and last cell
    # pixels that overlap with the box from 7.5 to 60.5 are 3 (center 7.47) and 28 (center 60.8).
    assert boxes[1][0] == 303 and boxes[1][2] == 328
    assert frame.check_box == pytest.approx(boxes[0])

    expected = Image.new("RGB", (600, 600))
    for reference, corner in zip(references, CELLS, strict=True):
        expected.paste(reference.image.resize((300, 300), Image.Resampling.BILINEAR), corner)
    for box in boxes[1:]:  # Pillow's rectangles include their corners
        ImageDraw.Draw(expected).rectangle(box, outline="red", width=2)
    assert mosaic.tobytes() == expected.tobytes()


def test_references_beyond_the_grid_are_not_shown(released):
    references = [masked(seed, (100, 40, 333, 199)) for seed in range(1, 7)]
    frame, (mosaic, _) = released.draw_images(noise_image(0), references)
    assert frame.layout.grid == 2 and len(listed_boxes(released, frame)) == 3
    four, (same, _) = released.draw_images(noise_image(0), references[:4])
    assert mosaic.tobytes() == same.tobytes() and four.support_boxes == frame.support_boxes
    default = released.with_settings(mosaic=None)
    frame, _ = default.draw_images(noise_image(0), references)
    assert frame.layout.grid == 3 and len(frame.support_boxes) == 5


def test_a_reference_that_is_not_shown_is_not_the_proxy_query(released):
    references = [*(Reference(noise_image(seed)) for seed in range(4)), masked(9, (100, 40, 333, 199))]
    frame, _ = released.draw_images(noise_image(0), references)
    assert frame.proxy is None and frame.support_boxes == () and frame.check_box is None


@pytest.mark.parametrize("count", [2, 3])
def test_grid_setting_applies_to_fewer_references(released, count):
    references = [masked(seed, (100, 40, 333, 199)) for seed in range(count)]
    frame, (mosaic, _) = released.draw_images(noise_image(0), references)
    assert frame.layout.grid == 2
    assert not np.asarray(mosaic)[300:, 300:].any(), "a cell without a reference is black"


def test_box_of_a_single_reference_is_not_drawn_as_released(released):
    reference = masked(1, (100, 40, 333, 199), (600, 600))
    _, (mosaic, _) = released.draw_images(noise_image(0), [reference])
    assert mosaic.tobytes() == reference.image.tobytes()
    _, (marked, _) = released.with_settings(mosaic=None).draw_images(noise_image(0), [reference])
    assert marked.getpixel((100, 40)) == RED and marked.getpixel((332, 198)) == RED


def test_box_of_a_mask_too_small_for_its_cell_is_that_of_the_mask():
    mask = np.zeros((1000, 1000), dtype=np.uint8)
    mask[500, 500] = 255  # its weight in a cell of 30 x 30 is 0.0009, and 0.0009 * 255 is rounded to 0
    references = [Reference(noise_image(seed, (1000, 1000)), mask=Image.fromarray(mask)) for seed in (1, 2)]
    assert not np.asarray(references[0].mask.resize((30, 30), Image.Resampling.BILINEAR)).any()
    resolved = resolve_references(references, 60, RELEASED)
    assert resolved.boxes == ((500, 500, 501, 501),) * 2


def test_inclusive_corners_round_trip(released):
    frame, _ = released.draw_images(noise_image(0, (600, 600)), [])
    assert frame.image_box_to_text((10, 20, 30, 41)) == (10, 20, 29, 40)
    assert frame.text_box_to_image((10, 20, 29, 40)) == (10, 20, 30, 41)
    assert frame.text_box_to_image((0, 0, 0, 0)) == (0, 0, 0, 0)
    default, _ = released.with_settings(mosaic=None).draw_images(noise_image(0, (600, 600)), [])
    assert default.image_box_to_text((10, 20, 30, 41)) == (10, 20, 30, 41)


def test_default_mosaic_and_instruction_are_unchanged(processor):
    """Compare a hash of the mosaic and the instruction with that of an earlier version without mosaic settings."""
    size = (32, 32)  # size of a cell, hence no resampling
    mask = np.zeros(size, dtype=np.uint8)
    mask[3:20, 5:9] = 255
    references = [
        Reference(noise_image(1, size), box=(2, 3, 20, 30)),
        Reference(noise_image(2, size), mask=Image.fromarray(mask)),
        Reference(noise_image(3, size), box=(7.5, 1, 31, 9.25)),
    ]
    frame, (mosaic, _) = processor.draw_images(noise_image(0, (64, 64)), references)
    instruction = processor.instruction("red circle", frame)
    assert "provided at [58,5,64,31], [12,52,48,64]." in instruction
    assert hashlib.sha256(mosaic.tobytes() + instruction.encode()).hexdigest()[:16] == "f30971e36fda177b"


TWO = [(2.0, 3.0, 12.0, 13.0), (30.0, 20.0, 60.0, 44.0)]  # in pixels of a 64 x 48 image


def test_all_boxes_of_a_reference_are_drawn_and_listed(processor):
    processor = processor.with_settings(canvas_size=600, coordinate_scale=600.0)
    references = [Reference(noise_image(1), box=(1, 1, 9, 9)), Reference(noise_image(2), boxes=TWO)]
    frame, (mosaic, _) = processor.draw_images(noise_image(0), references)
    # Cell 1 starts at x = 300. The scale factors from image to canvas are 300 / 64 and 300 / 48.
    expected = [
        [309, 19, 356, 81],
        [441, 125, 581, 275],
    ]
    assert listed_boxes(processor, frame) == expected
    official = processor.instruction("red circle", frame)
    assert "provided at [309,19,356,81], [441,125,581,275]." in official
    # The pixels that contain 309.4, 356.2, 440.6 and 581.2.
    for left, right, y in ((309, 356, 50), (440, 581, 200)):
        red = np.flatnonzero((np.asarray(mosaic)[y, 300:] == RED).all(axis=-1)) + 300
        assert {left, left + 1, right - 1, right} <= set(red.tolist()) and (left + right) // 2 not in red


def test_check_of_a_proxy_query_with_several_boxes(processor):
    references = [
        Reference(noise_image(1), boxes=TWO, role="proxy"),
        Reference(noise_image(2), box=(1, 1, 9, 9)),
    ]
    processor = processor.with_settings(canvas_size=600, coordinate_scale=600.0)
    frame, (mosaic, _) = processor.draw_images(noise_image(0), references)
    assert len(listed_boxes(processor, frame)) == 1
    assert not (np.asarray(mosaic)[:300, :300] == RED).all(axis=-1).any()
    small = (2 * 300 / 64, 3 * 300 / 48, 12 * 300 / 64, 13 * 300 / 48)
    large = (30 * 300 / 64, 20 * 300 / 48, 60 * 300 / 64, 44 * 300 / 48)
    union = (*small[:2], *large[2:])
    assert frame.check_iou(small) == frame.check_iou(large) == 1
    area_small, area_large, area_union = (
        (box[2] - box[0]) * (box[3] - box[1]) for box in (small, large, union)
    )
    assert frame.check_iou(union) == pytest.approx(area_large / area_union)
    assert frame.check_box == pytest.approx(large)
    enclosing = processor.with_settings(mosaic={"several_boxes": "enclosing"})
    frame, _ = enclosing.draw_images(noise_image(0), references)
    assert frame.check_iou(union) == 1
    assert frame.check_iou(small) == pytest.approx(area_small / area_union)
    assert frame.check_box == pytest.approx(union)
    assert enclosing_box(TWO) == (2, 3, 60, 44)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boxes": []}, "reference 0: boxes is empty"),
        ({"boxes": 3}, "reference 0: boxes is 3; pass a list"),
        ({"boxes": [(1, 1, 5, 5), (9, 9, 5, 9)]}, "reference 0: box 1 of 2: "),
        ({"boxes": [(1, 1, 5, 5)], "box": (1, 1, 5, 5)}, "both box and boxes"),
    ],
)
def test_rejects_invalid_boxes(fields, message):
    with pytest.raises(ValueError, match=message):
        resolve_references([{"image": noise_image(0), **fields}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": 4}, "grid is 4; use 2 or 3"),
        ({"corners": "round"}, "corners is 'round'; use 'exclusive' or 'inclusive'"),
        ({"mark_single": "no"}, "mark_single is 'no'"),
        ({"size": 3}, "unknown field 'size'; use one of grid"),
    ],
)
def test_rejects_invalid_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        MosaicSettings.from_dict(fields)


def test_settings_round_trip_through_json():
    assert MosaicSettings.from_dict(json.loads(json.dumps(RELEASED.to_dict()))) == RELEASED
    layout = make_layout(1, 600, RELEASED)
    assert layout.grid == 1 and compose_mosaic([noise_image(0)], [None], layout).size == (600, 600)
