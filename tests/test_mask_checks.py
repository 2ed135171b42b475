"""Masks must match the image after EXIF rotation; masks of the stored pixels are rejected or cause a warning."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from conceptseg_hf import Reference
from conceptseg_hf.images import load_image, load_mask, load_oriented_image, read_header
from conceptseg_hf.mask_checks import is_similar_size, looks_like_photo
from conceptseg_hf.references import resolve_references


def rotated_file(path, orientation, size=(30, 20)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise(size, 60).convert("RGB").save(path, exif=exif)
    return path


def mask_file(path, size, **options):
    mask = Image.new("L", size)
    mask.paste(255, (1, 2, 6, 5))
    mask.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_header_returns_the_rotated_size(tmp_path, orientation, ending):
    path = rotated_file(tmp_path / f"photo.{ending}", orientation)
    image, applied = load_oriented_image(path)
    assert read_header(path) == (image.size, applied) and applied == orientation
    assert image.size == ((30, 20) if orientation < 5 else (20, 30))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_mask_of_the_stored_pixels_is_rejected(tmp_path, orientation):
    photo = rotated_file(tmp_path / "photo.jpg", orientation)
    mask = mask_file(tmp_path / "mask.png", (30, 20))
    message = (
        rf"mask '.*mask\.png' has 30 x 20 pixels, but its image has 20 x 30 .* orientation {orientation} "
    )
    with pytest.raises(ValueError, match=message + ".*the mask matches the stored pixels"):
        resolve_references([Reference(photo, mask=mask)])
    upright = mask_file(tmp_path / "upright.png", (20, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_references([Reference(photo, mask=upright)]).boxes == ((1, 2, 6, 5),)
    if orientation == 6:  # a mask with the same EXIF orientation is also rotated
        exif = Image.Exif()
        exif[0x0112] = orientation
        rotated = mask_file(tmp_path / "rotated.png", (30, 20), exif=exif)
        assert resolve_references([Reference(photo, mask=rotated)]).boxes == ((15, 1, 18, 6),)


@pytest.mark.parametrize(
    ("orientation", "size"), [(2, (30, 20)), (3, (30, 20)), (4, (30, 20)), (6, (24, 24))]
)
def test_warns_when_the_size_does_not_reveal_rotation(tmp_path, orientation, size):
    photo = rotated_file(tmp_path / "photo.jpg", orientation, size)
    mask = mask_file(tmp_path / "mask.png", size)
    for source in (mask, np.asarray(Image.open(mask))):
        with pytest.warns(
            UserWarning, match=f"assumed to match its image after EXIF orientation {orientation} "
        ):
            resolved = resolve_references([Reference(photo, mask=source)])
        assert resolved.boxes == ((1, 2, 6, 5),), "in the rotated image"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_references([Reference(load_image(photo), mask=mask)])  # already rotated
        resolve_references([Reference(photo, box=(1, 2, 6, 5))])


def test_rotation_of_a_nearly_square_image_is_detected(tmp_path):
    photo = rotated_file(tmp_path / "photo.jpg", 6, (101, 100))
    size, orientation = read_header(photo)
    assert size == (100, 101) and is_similar_size((101, 100), size)
    stored, upright = (mask_file(tmp_path / f"{n}.png", s) for n, s in enumerate([(101, 100), (100, 101)]))
    with pytest.raises(ValueError, match="matches the stored pixels"):
        load_mask(stored, size, orientation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_mask(upright, size, orientation).any()


def scene(size=(120, 90)):
    """A smooth image with an object and sensor noise, similar to a photo."""
    across, down = np.meshgrid(np.linspace(0, 180, size[0]), np.linspace(0, 60, size[1]))
    image = Image.fromarray(np.stack([across + down, across, 200 - across], -1).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((20, 20, 70, 60), fill=(200, 40, 30))
    noise = np.random.default_rng(0).normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def ellipse(size=(120, 90)):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((20, 20, 70, 60), fill=255)
    return mask


def as_jpeg(image, quality=75):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_photos_are_distinguished_from_masks():
    assert looks_like_photo(scene()) and looks_like_photo(scene().convert("L"))
    assert looks_like_photo(as_jpeg(scene())) and looks_like_photo(as_jpeg(scene(), 95))
    mask = ellipse()
    instances = np.arange(120 * 90, dtype=np.int32).reshape(90, 120) // 40  # 270 regions of 40 pixels
    for image in (
        mask,
        as_jpeg(mask),
        as_jpeg(mask, 30),
        mask.filter(ImageFilter.GaussianBlur(3)),
        mask.convert("1"),
        mask.convert("P"),
        Image.merge("RGB", [mask, Image.new("L", mask.size), mask]),
        Image.new("L", mask.size),
        Image.fromarray(instances),
        Image.fromarray(np.asarray(mask) > 0).resize((7, 5)),
        Image.fromarray(np.random.default_rng(0).integers(0, 2, (50, 60), dtype=np.uint8)),
    ):
        assert not looks_like_photo(image), image
