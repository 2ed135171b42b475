"""Images of all modes and types are converted to 8-bit RGB, masks to bool; invalid input raises one-sentence errors."""

from __future__ import annotations

import io
import pathlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conceptseg_hf.images import load_image, load_mask

SIZE = (7, 5)  # width, height


def gray_ramp() -> np.ndarray:
    """A uint8 array (H, W) with many levels, including 0 and 255."""
    return np.linspace(0, 255, SIZE[0] * SIZE[1]).round().astype(np.uint8).reshape(SIZE[1], SIZE[0])


def colors() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def pixels(image: object) -> np.ndarray:
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_all_modes_are_converted_to_rgb(mode: str) -> None:
    source = Image.fromarray(gray_ramp())
    if mode == "I;16":
        image = Image.fromarray(gray_ramp().astype(np.uint16) * 257)
    elif mode == "PA":
        image = source.convert("P").convert("PA")
    else:
        image = (source.convert("RGB") if mode in ("HSV", "YCbCr") else source).convert(mode)
    expected = source.convert("1").convert("L") if mode == "1" else source
    difference = np.abs(pixels(image).astype(int) - np.asarray(expected, dtype=int)[..., None])
    assert difference.max() <= 3
    assert load_image(image).size == SIZE


def test_failed_conversion_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(
        ValueError,
        match=r"image \(a PIL image of mode CMYK\) cannot be converted to RGB: conversion not supported\.",
    ):
        load_image(Image.new("CMYK", SIZE))


def test_palette_colors_are_kept() -> None:
    image = colors()
    quantized = image.quantize(256)
    np.testing.assert_array_equal(pixels(quantized), np.asarray(quantized.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new(mode, SIZE, (10, 0) if mode == "LA" else (10, 20, 30, 0))
    assert (pixels(image) == 255).all()


def test_palette_with_transparency_becomes_white() -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([10, 20, 30] + [0, 0, 0] * 255)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert (pixels(buffer.getvalue()) == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        gray_ramp(),
        gray_ramp()[..., None],
        np.stack([gray_ramp()] * 3, -1),
        np.stack([gray_ramp()] * 3 + [np.full_like(gray_ramp(), 255)], -1),
        gray_ramp().astype(np.uint16) * 257,
        gray_ramp().astype(np.int64),
        gray_ramp() / 255.0,
        (gray_ramp() / 255.0).astype(np.float32),
        torch.from_numpy(gray_ramp()),
    ],
    ids=["HxW", "HxWx1", "HxWx3", "HxWx4", "uint16", "int64", "float64", "float32", "tensor"],
)
def test_arrays(array: np.ndarray) -> None:
    np.testing.assert_array_equal(pixels(array), np.stack([gray_ramp()] * 3, -1))


def test_bool_array() -> None:
    array = gray_ramp() > 100
    np.testing.assert_array_equal(pixels(array), np.stack([array * np.uint8(255)] * 3, -1))


def test_float_image_of_either_range() -> None:
    ramp = gray_ramp().astype(np.float32)
    np.testing.assert_array_equal(pixels(Image.fromarray(ramp)), pixels(Image.fromarray(ramp / 255)))


def test_path_bytes_and_file_object_agree(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "image.png"
    colors().save(path)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        io.BytesIO(path.read_bytes()),
    ):
        np.testing.assert_array_equal(pixels(source), np.asarray(colors()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: pathlib.Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.png"
    colors().save(path, exif=exif)
    loaded = load_image(path)
    assert loaded.size == (SIZE if orientation <= 4 else SIZE[::-1])
    transpose = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    expected = colors() if transpose is None else colors().transpose(transpose)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected))
    np.testing.assert_array_equal(pixels(loaded), np.asarray(expected))  # loading again does not rotate again


def test_unreadable_exif_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(ImageOps, "exif_transpose", refuse)
    np.testing.assert_array_equal(pixels(colors()), np.asarray(colors()))


@pytest.fixture()
def server():
    """A local web server with one image."""
    buffer = io.BytesIO()
    colors().save(buffer, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            exists = self.path == "/image.png"
            self.send_response(200 if exists else 404)
            self.end_headers()
            if exists:
                self.wfile.write(buffer.getvalue())

        def log_message(self, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_url(server: str) -> None:
    np.testing.assert_array_equal(pixels(f"{server}/image.png"), np.asarray(colors()))
    with pytest.raises(ValueError, match=r"cannot be downloaded: HTTP Error 404.*\.$"):
        load_image(f"{server}/other.png")


def is_sentence(error: BaseException) -> bool:
    text = str(error)
    return text.endswith(".") and "\n" not in text and len(text) > 20


def test_truncated_file_is_rejected(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="damaged or not an image") as caught:
        load_image(path)
    assert is_sentence(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "invalid",
    [
        b"no image",
        b"",
        io.BytesIO(b"no image"),
        None,
        7,
        {"image": 1},
        np.zeros((3, 4, 2)),
        np.zeros((3, 6, 7), dtype=np.uint8),
        np.zeros((0, 4), dtype=np.uint8),
        np.full((3, 3), 1.5),
        np.full((3, 3), np.nan),
        np.full((3, 3), -1),
        np.full((3, 3), 70000),
        np.zeros((3, 3), dtype=complex),
        np.array([["a", "b"]]),
        torch.empty(3, 3, device="meta"),
        Image.new("RGB", (0, 3)),
        "data/with/no/such/file.png",
        pathlib.Path(),
        "http://",
    ],
    ids=lambda value: type(value).__name__,
)
def test_invalid_images_raise_one_sentence(invalid: object) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(invalid)
    assert is_sentence(caught.value)


def test_missing_file_raises_file_not_found_error() -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        load_image("missing.png")


def test_decompression_bomb_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large to be opened safely"):
        load_image(buffer.getvalue())


FOREGROUND = np.zeros((SIZE[1], SIZE[0]), dtype=bool)
FOREGROUND[1:4, 2:6] = True


@pytest.mark.parametrize(
    "mask",
    [
        FOREGROUND,
        FOREGROUND.astype(np.uint8),
        FOREGROUND.astype(np.uint8) * 255,
        FOREGROUND.astype(np.uint8) * 7,
        FOREGROUND.astype(np.int64) * 3,
        FOREGROUND.astype(np.float32),
        FOREGROUND.astype(np.uint16) * 65535,
        FOREGROUND[..., None],
        np.stack([FOREGROUND * np.uint8(255), FOREGROUND * np.uint8(0), FOREGROUND * np.uint8(0)], -1),
        torch.from_numpy(FOREGROUND),
    ],
    ids=["bool", "0/1", "0/255", "0/7", "int64", "float", "uint16", "HxWx1", "red", "tensor"],
)
def test_mask_arrays(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(load_mask(mask, SIZE), FOREGROUND)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"]
)
def test_mask_images(mode: str) -> None:
    source = Image.fromarray(FOREGROUND.astype(np.uint8) * 255)
    if mode in ("P", "PA"):
        image = (
            Image.fromarray(FOREGROUND.astype(np.uint8) * 3, "P")
            if mode == "P"
            else source.convert("RGBA").convert("PA")
        )
    elif mode == "I;16":
        image = Image.fromarray(FOREGROUND.astype(np.uint16) * 65535)
    else:
        image = source.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else source.convert(mode)
    np.testing.assert_array_equal(load_mask(image, SIZE), FOREGROUND)


@pytest.mark.parametrize("mode", ["gif", "quantized", "classes"])
def test_palette_masks(mode: str, tmp_path: pathlib.Path) -> None:
    """Black-and-white palettes are read by color, in any order; class palettes by index."""
    source = Image.fromarray(FOREGROUND.astype(np.uint8) * 255)
    if mode == "gif":
        source.convert("RGB").save(tmp_path / "mask.gif")
        image = Image.open(tmp_path / "mask.gif")
    elif mode == "quantized":
        image = source.quantize(2)
    else:
        image = Image.fromarray(FOREGROUND.astype(np.uint8), "P")
        image.putpalette([200, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(load_mask(image, SIZE), FOREGROUND)


@pytest.mark.parametrize("white", [200, 255])
def test_soft_mask_is_thresholded_at_128(white: int) -> None:
    mask = np.array([[0, 100, 127, 128, white]], dtype=np.uint8)
    np.testing.assert_array_equal(load_mask(mask), [[False, False, False, True, True]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_background(mode: str) -> None:
    image = Image.new(mode, SIZE, (255, 0) if mode == "LA" else (255, 255, 255, 0))
    assert not load_mask(image).any()


def test_mask_file_is_rotated_like_its_image(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "mask.png"
    Image.fromarray(FOREGROUND.astype(np.uint8) * 255).save(path, exif=exif)
    np.testing.assert_array_equal(load_mask(path, SIZE[::-1]), np.rot90(FOREGROUND, -1))


def test_mask_of_another_size_is_rejected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"mask has 7 x 5 pixels, but its image has 7 x 6; give a mask of the image's size\."
    ):
        load_mask(FOREGROUND, (7, 6))
    path = tmp_path / "mask.png"
    Image.fromarray(FOREGROUND).save(path)
    with pytest.raises(
        ValueError, match=r"mask '.*mask\.png' has 7 x 5 .* width and height are swapped, as before EXIF"
    ):
        load_mask(path, (5, 7))
