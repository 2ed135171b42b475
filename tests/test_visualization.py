from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont

from conceptseg_hf import ConceptSegmentation, Reference
from conceptseg_hf.visualization import (
    BOX_COLOR,
    MASK_COLOR,
    _dilate,
    _wrap,
    caption_of,
    draw_box,
    draw_mosaic,
    overlay,
    panel,
    scaled_overlay,
)

GRAY = Image.new("RGB", (40, 30), (100, 100, 100))


def half_mask(size: tuple[int, int] = (40, 30)) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[:, : size[0] // 2] = True
    return mask


def test_overlay_tints_inside_and_darkens_outside():
    pixels = np.asarray(overlay(GRAY, half_mask(), opacity=0.5)).astype(int)
    assert pixels[15, 5].tolist() == pytest.approx([(100 + c) / 2 for c in MASK_COLOR], abs=1)
    assert (pixels[15, 35] < 100).all()
    assert pixels[15, 20].tolist() == list(MASK_COLOR), "the outline is drawn around the mask"


def test_overlay_accepts_all_mask_types_and_does_not_modify_inputs():
    mask = half_mask()
    mask_image = Image.fromarray(mask.astype(np.uint8) * 255)
    before = GRAY.tobytes()
    assert overlay(GRAY, mask).tobytes() == overlay(GRAY, mask_image).tobytes()
    assert GRAY.tobytes() == before
    assert overlay(GRAY.convert("L"), None).mode == "RGB"


def test_overlay_rejects_invalid_input():
    with pytest.raises(ValueError, match="resize one of them"):
        overlay(GRAY, half_mask((10, 10)))
    with pytest.raises(ValueError, match="opacity"):
        overlay(GRAY, None, opacity=2)


def test_draw_box_marks_the_exact_pixels():
    pixels = np.asarray(draw_box(GRAY, (10, 5, 20, 15)))
    drawn = (pixels == BOX_COLOR).all(axis=-1)
    assert (np.flatnonzero(drawn.any(axis=0))[[0, -1]] == (10, 19)).all()
    assert (np.flatnonzero(drawn.any(axis=1))[[0, -1]] == (5, 14)).all()
    assert not drawn[10, 15]


def test_mosaic_draws_support_boxes_and_the_check_box_but_not_the_proxy_box():
    references = [Reference(GRAY, box=(4, 4, 30, 20)), Reference(GRAY, box=(4, 4, 30, 20))]
    pixels = np.asarray(draw_mosaic(references, 80)).astype(int)
    red = (pixels == (255, 0, 0)).all(axis=-1)
    assert not red[:, :40].any() and red[:40, 40:].any()
    checked = np.asarray(draw_mosaic(references, 80, check=(0, (4, 4, 30, 20))))
    assert (checked == BOX_COLOR).all(axis=-1)[:40, :40].any()


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (1, 1), (900, 700)])
def test_panel_draws_a_row_and_a_caption(size):
    image = Image.new("RGB", size, (90, 90, 90))
    plain = panel(image, half_mask(size), height=64)
    assert plain.mode == "RGB"
    full = panel(
        image,
        half_mask(size),
        references=[Reference(GRAY)],
        box=(0, 0, size[0], size[1]),
        ground_truth=half_mask(size),
        caption="a caption\nof two lines",
        height=64,
    )
    assert full.height > plain.height
    assert full.width >= plain.width


def test_panel_without_mask_and_with_mismatched_mask():
    assert panel(GRAY, None, caption="failed").width > 0
    with pytest.raises(ValueError, match="resize one of them"):
        panel(GRAY, half_mask((3, 3)))


def test_captions_are_wrapped_and_cut():
    font = ImageFont.load_default(size=15)
    lines = _wrap("one two three " * 6 + "unbreakable" * 20, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert len(_wrap("word " * 500, font, 60)) == 12
    assert _wrap("", font, 60) == []
    assert _wrap("überall 概念", font, 300) == ["überall 概念"]


def test_caption_describes_the_route():
    mask = Image.new("L", (4, 4))
    shortcut = ConceptSegmentation(mask, "cat", 0.5, route="shortcut", presence=0.9, threshold=0.1)
    assert caption_of(shortcut, "cat").splitlines() == [
        "prompt: cat",
        "shortcut, score 0.50, SAM 3 presence 0.90 (threshold 0.10)",
    ]
    reasoned = ConceptSegmentation(mask, "cat", 0.5, route="reasoning", rule="has ears", check_iou=0.25)
    text = caption_of(reasoned, "the pet", "IoU 0.10")
    assert (
        "rule: has ears" in text
        and "answer: none given" in text
        and "IoU of the check box on the proxy query: 0.25" in text
    )
    assert "IoU 0.10" in text
    assert "not readable" in caption_of(ConceptSegmentation.failed("not readable."), "cat")


@pytest.mark.parametrize("radius", [1, 3, 10])
def test_dilate_matches_a_square_maximum_filter(radius):
    mask = Image.fromarray(np.random.default_rng(0).random((40, 60)) > 0.99).convert("L")
    assert np.array_equal(_dilate(mask, radius), mask.filter(ImageFilter.MaxFilter(2 * radius + 1)))


def test_cost_of_an_outline_does_not_depend_on_its_width(monkeypatch):
    """Dilation takes two box filters, whose cost does not depend on the radius; a square filter would take minutes."""
    passes = []
    original_filter = Image.Image.filter
    monkeypatch.setattr(
        Image.Image, "filter", lambda self, kind: passes.append(type(kind)) or original_filter(self, kind)
    )
    for size in ((5000, 20), (4000, 3000)):
        scaled = scaled_overlay(Image.new("RGB", size), np.ones(size[::-1], dtype=bool), 320)
        assert scaled.height == 320 and scaled.width <= 8 * 320
        overlay(Image.new("RGB", size), np.ones(size[::-1], dtype=bool))
    assert passes == 8 * [ImageFilter.BoxBlur]
