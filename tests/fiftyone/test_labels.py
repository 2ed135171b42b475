"""Tests that labels can be converted back to the same masks and boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SIZES = st.integers(1, 300)


@st.composite
def masks(draw) -> np.ndarray:
    """Generate masks of rectangles (including lines) and noise, with regions that touch, nest or fill the image."""
    width, height = draw(SIZES), draw(SIZES)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(draw(st.integers(1, 5))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
        mask[top:bottom, left:right] ^= True
    if draw(st.booleans()):
        patch = mask[-30:, -30:]
        noise = np.random.default_rng(draw(st.integers(0, 99))).random(patch.shape)
        patch ^= noise > draw(st.sampled_from([0.5, 0.9]))
    return mask


def labels_of(mask: np.ndarray, outputs=("detections",), prompt="star", label=None, **values):
    from conceptseg_hf.integrations.fiftyone.labels import attributes_of, to_labels
    from conceptseg_hf.outputs import ConceptSegmentation

    mask_image = Image.fromarray(mask.astype(np.uint8) * 255)
    result = ConceptSegmentation(mask=mask_image, label="an answer", score=0.25, **values)
    return to_labels(result, attributes_of(result, prompt), outputs, label=label)


@settings(max_examples=100, deadline=None)
@given(mask=masks())
def test_detections_restore_the_mask(fo, mask):
    """FiftyOne's conversion rounds coordinates down."""
    detections = labels_of(mask)["detections"]
    size = mask.shape[::-1]
    restored = detections.to_segmentation(frame_size=size, mask_targets={255: "star"}).get_mask()
    assert np.array_equal(restored > 0, mask)
    for one in detections.detections[:5]:
        assert np.count_nonzero(one.to_segmentation(frame_size=size).get_mask()) == one.mask.sum()


@settings(max_examples=400, deadline=None)
@given(data=st.data(), size=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))
def test_integer_coordinates_are_restored(fo, data, size):
    """They are restored by rounding down, by rounding, and by `pixel_box`, as used in exporters and the mosaic."""
    from conceptseg_hf.integrations.fiftyone.labels import pixel_box, relative_box

    starts = [data.draw(st.integers(0, length - 1)) for length in size]
    ends = [data.draw(st.integers(start + 1, length)) for start, length in zip(starts, size)]
    box = (*starts, *ends)
    x, y, width, height = relative_box(box, size)
    for convert in (int, round):
        restored = [
            convert(x * size[0]),
            convert(y * size[1]),
            convert((x + width) * size[0]),
            convert((y + height) * size[1]),
        ]
        assert tuple(restored) == box
    assert x + width <= 1 and y + height <= 1
    assert (round(width * size[0]), round(height * size[1])) == (ends[0] - starts[0], ends[1] - starts[1])
    assert pixel_box((x, y, width, height), size) == box
    divided = (
        starts[0] / size[0],
        starts[1] / size[1],
        width,
        height,
    )  # fractions as written by other software
    assert pixel_box(divided, size)[:2] == box[:2]


def test_fractional_coordinates_are_restored(fo):
    from conceptseg_hf.integrations.fiftyone.labels import pixel_box, relative_box

    box = (1.25, 2.5, 30.75, 40.4)
    assert pixel_box(relative_box(box, (64, 48)), (64, 48)) == pytest.approx(box)


def test_the_class_is_the_prompt_or_the_label(fo):
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:5, 3:9] = mask[10:12, 20:22] = True
    first, second = labels_of(mask, prompt="red\n star", answer="a red star")["detections"].detections
    assert {first.label, second.label} == {"red star"} and first["answer"] == "a red star"
    assert first.confidence == 0.25 and not first.has_attribute("score")
    chosen = labels_of(mask, prompt="red star", label="defect")["detections"]
    assert {one.label for one in chosen.detections} == {"defect"} and chosen["score"] == 0.25


def test_a_failed_result_has_an_empty_mask_of_the_images_size(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone.labels import attributes_of, predicted_mask, to_labels
    from conceptseg_hf.outputs import ConceptSegmentation

    result = ConceptSegmentation.failed("it failed.", "star")
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(rotated, exif=exif)
    (tmp_path / "empty.png").write_bytes(b"")
    for image, shape in (
        (rotated, (30, 20)),
        (tmp_path / "empty.png", (1, 1)),
        (np.zeros((5, 7, 3)), (5, 7)),
    ):
        given_image = image if isinstance(image, np.ndarray) else str(image)
        labels = to_labels(
            result, attributes_of(result, "star"), ("segmentation", "detections"), image=given_image
        )
        mask = labels["segmentation"].get_mask()
        assert mask.shape == shape and not mask.any()
        assert labels["segmentation"]["error"] == labels["detections"]["error"] == "it failed."
        assert labels["detections"].detections == [] and predicted_mask(labels["segmentation"]) is None
