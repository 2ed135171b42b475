"""Pictures on disk: never half-written, never overwritten."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import fiftyone as fo
import numpy as np
from PIL import Image

from ...writing import image_bytes, write_file


def default_folder(dataset_name: str, *parts: str) -> Path:
    """Where pictures of a dataset go, below FiftyOne's own folder for data."""
    return Path(fo.config.default_dataset_dir, "conceptseg", *map(_folder_name, (dataset_name, *parts)))


def _folder_name(name: str) -> str:
    """A name as that of one folder: datasets may be called "../x", and must not write there."""
    name = re.sub(r"[/\\]", "_", name)
    return name if name.strip(".") else name.replace(".", "_")


def write_image(image: Image.Image, folder: Path, stem: str) -> str:
    """Writes a PNG whose name ends in a hash of its content.

    A name thus stands for one content: a file is complete or not there, other datasets and the browser's cache may hold
    on to it, and writing it again changes nothing. A file that was edited since keeps its name and what it holds; the
    picture then goes into another one.

    Returns:
        The absolute path.
    """
    content = image_bytes(image)
    name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}"
    path, copies = folder / f"{name}.png", 1
    while path.exists() and path.read_bytes() != content:  # somebody edited it
        copies += 1
        path = folder / f"{name}-{copies}.png"
    if not path.exists():
        write_file(path, content)
    return str(path.absolute())


def probabilities_to_image(probabilities: np.ndarray) -> Image.Image:
    """(H, W) probabilities as an 8-bit picture, 255 for 1."""
    return Image.fromarray(np.rint(np.clip(probabilities, 0, 1) * 255).astype(np.uint8))
