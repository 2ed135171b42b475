from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont

from conceptseg_hf import ConceptSegmentation, Reference
from conceptseg_hf.visualization import (
    BOX_COLOR,
    MASK_COLOR,
    _dilated,
    _wrapped,
    caption_of,
    draw_box,
    draw_mosaic,
    overlay,
    panel,
    scaled_overlay,
)

GREY = Image.new("RGB", (40, 30), (100, 100, 100))


def half_mask(size: tuple[int, int] = (40, 30)) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[:, : size[0] // 2] = True
    return mask


def test_overlay_tints_inside_and_darkens_outside():
    pixels = np.asarray(overlay(GREY, half_mask(), opacity=0.5)).astype(int)
    assert pixels[15, 5].tolist() == pytest.approx([(100 + c) / 2 for c in MASK_COLOR], abs=1)
    assert (pixels[15, 35] < 100).all()
    assert pixels[15, 20].tolist() == list(MASK_COLOR), "the outline is drawn around the mask"


def test_overlay_takes_any_mask_and_leaves_its_inputs_alone():
    mask = half_mask()
    as_picture = Image.fromarray(mask.astype(np.uint8) * 255)
    before = GREY.tobytes()
    assert overlay(GREY, mask).tobytes() == overlay(GREY, as_picture).tobytes()
    assert GREY.tobytes() == before
    assert overlay(GREY.convert("L"), None).mode == "RGB"


def test_overlay_errors():
    with pytest.raises(ValueError, match="one size"):
        overlay(GREY, half_mask((10, 10)))
    with pytest.raises(ValueError, match="opacity"):
        overlay(GREY, None, opacity=2)


def test_draw_box_covers_exactly_its_pixels():
    pixels = np.asarray(draw_box(GREY, (10, 5, 20, 15)))
    drawn = (pixels == BOX_COLOR).all(axis=-1)
    assert (np.flatnonzero(drawn.any(axis=0))[[0, -1]] == (10, 19)).all()
    assert (np.flatnonzero(drawn.any(axis=1))[[0, -1]] == (5, 14)).all()
    assert not drawn[10, 15]


def test_mosaic_draws_supports_and_the_check_but_not_the_proxys_box():
    references = [Reference(GREY, box=(4, 4, 30, 20)), Reference(GREY, box=(4, 4, 30, 20))]
    pixels = np.asarray(draw_mosaic(references, 80)).astype(int)
    red = (pixels == (255, 0, 0)).all(axis=-1)
    assert not red[:, :40].any() and red[:40, 40:].any()
    checked = np.asarray(draw_mosaic(references, 80, check=(0, (4, 4, 30, 20))))
    assert (checked == BOX_COLOR).all(axis=-1)[:40, :40].any()


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (1, 1), (900, 700)])
def test_panel_is_one_row_over_a_caption(size):
    image = Image.new("RGB", size, (90, 90, 90))
    plain = panel(image, half_mask(size), height=64)
    assert plain.mode == "RGB"
    full = panel(
        image,
        half_mask(size),
        references=[Reference(GREY)],
        box=(0, 0, size[0], size[1]),
        ground_truth=half_mask(size),
        caption="a caption\nof two lines",
        height=64,
    )
    assert full.height > plain.height
    assert full.width >= plain.width


def test_panel_without_a_mask_and_with_a_wrong_one():
    assert panel(GREY, None, caption="failed").width > 0
    with pytest.raises(ValueError, match="one size"):
        panel(GREY, half_mask((3, 3)))


def test_captions_wrap_to_the_width_and_end():
    font = ImageFont.load_default(size=15)
    lines = _wrapped("one two three " * 6 + "unbreakable" * 20, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert len(_wrapped("word " * 500, font, 60)) == 12
    assert _wrapped("", font, 60) == []
    assert _wrapped("überall 概念", font, 300) == ["überall 概念"]


def test_caption_tells_the_route():
    mask = Image.new("L", (4, 4))
    shortcut = ConceptSegmentation(mask, "cat", 0.5, route="shortcut", presence=0.9, threshold=0.1)
    assert caption_of(shortcut, "cat").splitlines() == [
        "prompt: cat",
        "shortcut, score 0.50, SAM 3's first look 0.90 (threshold 0.10)",
    ]
    reasoned = ConceptSegmentation(mask, "cat", 0.5, route="reasoning", rule="has ears", check_iou=0.25)
    text = caption_of(reasoned, "the pet", "IoU 0.10")
    assert "rule: has ears" in text and "answer: none given" in text and "IoU 0.25" in text
    assert "IoU 0.10" in text
    assert "not readable" in caption_of(ConceptSegmentation.failed("not readable."), "cat")


@pytest.mark.parametrize("radius", [1, 3, 10])
def test_outlines_widen_by_a_square(radius):
    mask = Image.fromarray(np.random.default_rng(0).random((40, 60)) > 0.99).convert("L")
    assert np.array_equal(_dilated(mask, radius), mask.filter(ImageFilter.MaxFilter(2 * radius + 1)))


def test_the_cost_of_an_outline_does_not_grow_with_its_width(monkeypatch):
    """Two passes of a filter whose cost is that of the pixels alone; one by the whole square takes minutes."""
    passes = []
    filtered = Image.Image.filter
    monkeypatch.setattr(
        Image.Image, "filter", lambda self, kind: passes.append(type(kind)) or filtered(self, kind)
    )
    for size in ((5000, 20), (4000, 3000)):
        picture = scaled_overlay(Image.new("RGB", size), np.ones(size[::-1], dtype=bool), 320)
        assert picture.height == 320 and picture.width <= 8 * 320
        overlay(Image.new("RGB", size), np.ones(size[::-1], dtype=bool))
    assert passes == 8 * [ImageFilter.BoxBlur]
