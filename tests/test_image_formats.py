"""Errors for files that Pillow cannot open name the format and the remedy."""

from __future__ import annotations

import base64
import io
import pathlib
import struct
import sys

import numpy as np
import pytest

from conceptseg_hf.images import load_image, load_mask, read_header

# A red image of 16 x 16 pixels, written by pillow-heif.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAA"
    "AAAAACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAACYAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "AA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNw"
    "AAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPB"
    "iQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAEAAAAAEAAAAQAAAAAf///9AAAAAC"
    "////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAALm1kYXQAAAAiKAGvBBITTOD46cJo"
    "P9hl+B5V/u8n7asr40mfd7EYkqn/oA=="
)


def tiff(values: np.ndarray, sample_format: int) -> bytes:
    """Encode values (H, W, C) as an uncompressed TIFF; sample format 1 is integer, 3 is float."""
    height, width, channels = values.shape
    bits = values.dtype.itemsize * 8
    pixels = values.tobytes()
    extra = 8 + len(pixels)
    many = struct.pack(f"<{channels}H", *[bits] * channels) + struct.pack(
        f"<{channels}H", *[sample_format] * channels
    )
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, extra if channels > 2 else bits),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if channels == 3 else 1),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
        (339, 3, channels, extra + 2 * channels if channels > 2 else sample_format),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = struct.pack("<2sHI", b"II", 42, extra + len(many))
    return start + pixels + many + directory + struct.pack("<I", 0)


def test_tiff_helper_writes_valid_files() -> None:
    values = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(np.asarray(load_image(tiff(values, 1))), values)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (tiff(np.full((4, 5, 3), 0.5, np.float32), 3), "of 3 channels, each 32-bit float,"),
        (tiff(np.ones((4, 5, 3), np.uint32), 1), "of 3 channels, each 32-bit unsigned integer,"),
        (tiff(np.full((4, 5, 1), 0.5, np.float64), 3), "of 1 channel, 64-bit float,"),
    ],
)
def test_unsupported_tiff_dtype_is_explained(tmp_path: pathlib.Path, content: bytes, kind: str) -> None:
    path = tmp_path / "scan.tif"
    path.write_bytes(content)
    for read in (load_image, load_mask, read_header):
        with pytest.raises(
            ValueError, match=rf"scan\.tif' is a TIFF image {kind} that Pillow cannot read"
        ) as caught:
            read(path)
        assert "damaged" not in str(caught.value) and str(caught.value).endswith("as an array.")


def test_heic_without_pillow_heif_names_the_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(HEIC)
    for source in (path, HEIC, io.BytesIO(HEIC)):
        with pytest.raises(
            ValueError, match=r"is a HEIC image, .* install it with: pip install pillow-heif\.$"
        ):
            load_image(source)


def test_heic_is_read_with_pillow_heif() -> None:
    pytest.importorskip("pillow_heif")
    pixels = np.asarray(load_image(HEIC)).astype(int)
    assert pixels.shape == (16, 16, 3) and np.abs(pixels - (200, 30, 40)).max() < 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X", "is a macOS metadata file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html></html>", "is a web page and not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", "is a video and not an image"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "is a JPEG XL image"),
        (b"\x93NUMPY\x01\x00v\x00", "is a NumPy file; read it with numpy.load"),
        (bytes(128) + b"DICM", "is a DICOM file"),
        (b"%PDF-1.4", "is a PDF document"),
    ],
)
def test_files_that_are_not_images_are_named(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_image(path)
    error = str(caught.value)
    assert error.startswith(f"image {str(path)!r} {message}") and error.endswith(".") and "\n" not in error


def test_unknown_format_is_reported_as_damaged(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(b"unknown format")
    with pytest.raises(ValueError, match="cannot be read; it is damaged or not an image"):
        load_image(path)
