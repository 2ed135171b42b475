"""Explanations for files that Pillow cannot open: formats that need a package, and files that are not images."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from PIL import TiffImagePlugin

# Number of bytes that `explain_unreadable` needs.
HEAD_LENGTH = 1024

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")

_SIGNATURES = (
    (b"\x00\x05\x16\x07", "is a macOS metadata file without pixels; give the file without the leading '._'"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the image itself; download it with: git lfs pull"),
    (b"\xff\x0a", "is a JPEG XL image, which Pillow cannot read; convert it to PNG or JPEG"),
    (b"\x00\x00\x00\x0cJXL ", "is a JPEG XL image, which Pillow cannot read; convert it to PNG or JPEG"),
    (b"\x76\x2f\x31\x01", "is an OpenEXR image, which Pillow cannot read; convert it to PNG"),
    (b"\x93NUMPY", "is a NumPy file; read it with numpy.load and give the array"),
    (b"%PDF", "is a PDF document and not an image; export the page as PNG"),
)  # fmt: skip
_MARKUP = (
    (b"<!doctype html", "is a web page and not an image; download the image itself"),
    (b"<html", "is a web page and not an image; download the image itself"),
    (b"<svg", "is an SVG drawing, which has no pixels; export it as PNG"),
    (b"<?xml", "is an XML file (perhaps an SVG drawing), which has no pixels; export it as PNG"),
)
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_SAMPLE_FORMATS = {1: "unsigned integer", 2: "signed integer", 3: "float", 5: "complex", 6: "complex"}


def is_heic(head: bytes) -> bool:
    """Whether a file starts like a HEIC (HEIF) image, a format used by phones."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC


def register_heic_reader() -> bool:
    """Register the HEIC reader of pillow-heif with Pillow and return whether that package is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def explain_unreadable(head: bytes) -> str | None:
    """Return fault and remedy for a file that Pillow cannot open; None if its format is not recognized.

    Args:
        head: The first `HEAD_LENGTH` bytes of the file.
    """
    if not head:
        return "is empty (0 bytes); fetch or export the file again"
    if is_heic(head):
        return (
            "is a HEIC image, which Pillow reads only with the package pillow-heif; install it with: pip install "
            "pillow-heif"
        )
    if head[4:8] == b"ftyp":
        if head[8:12] in _AVIF:
            return "is an AVIF image, which this Pillow cannot read; update it with: pip install -U pillow"
        return "is a video and not an image; extract a frame as PNG"
    if head.startswith(_TIFF):
        return (
            f"is a TIFF image{_tiff_kind(head)} that Pillow cannot read; convert it to 8 or 16 bits per channel, or "
            "give its pixels as an array"
        )
    if head[128:132] == b"DICM":
        return "is a DICOM file, which Pillow cannot read; export it as PNG, or give its pixels as an array"
    for signature, text in _SIGNATURES:
        if head.startswith(signature):
            return text
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((text for signature, text in _MARKUP if start.startswith(signature)), None)


def read_head(source: str | bytes | BinaryIO) -> bytes:
    """Return the first bytes of a path or a binary file; "?" if it cannot be read again."""
    try:
        if not isinstance(source, (str, bytes)):
            source.seek(0)
            return source.read(HEAD_LENGTH)
        with Path(os.fsdecode(source)).open("rb") as file:
            return file.read(HEAD_LENGTH)
    except (OSError, ValueError, AttributeError):
        return b"?"


def _tiff_kind(head: bytes) -> str:
    """Describe channels and dtype of a TIFF image; empty if its first directory is not within the first bytes."""
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(head[:8])
        file = io.BytesIO(head)
        file.seek(directory.next)
        directory.load(file)
        channels, bits = directory.get(277, 1), directory.get(258, (1,))
        kind = _SAMPLE_FORMATS.get(directory.get(339, (1,))[0], "")
        bits = bits if isinstance(bits, int) else bits[0]
    except Exception:  # Pillow raises various exceptions on malformed directories
        return ""
    return f" of {channels} channels, each {bits}-bit {kind},".replace(
        " of 1 channels, each", " of 1 channel,"
    )
