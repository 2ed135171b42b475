"""Write image files atomically, without overwriting existing ones."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import fiftyone as fo
from PIL import Image

from ...writing import image_bytes, write_file


def default_folder(dataset_name: str, *parts: str) -> Path:
    """Return the folder for images of a dataset, inside FiftyOne's default dataset directory."""
    return Path(fo.config.default_dataset_dir, "conceptseg", *map(_folder_name, (dataset_name, *parts)))


def _folder_name(name: str) -> str:
    """Convert a name to a single path component: a dataset named "../x" must not write outside the folder."""
    name = re.sub(r"[/\\]", "_", name)
    return name if name.strip(".") else name.replace(".", "_")


def write_image(image: Image.Image, folder: Path, stem: str) -> str:
    """Write an image to a PNG file with a hash of the content in its name.

    The name identifies the content, so other datasets and the browser's cache can refer to the file, and writing the
    same image again has no effect. If the existing file was edited, it is kept, and the image is written to another
    file.

    Returns:
        The absolute path.
    """
    content = image_bytes(image)
    name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}"
    path, copies = folder / f"{name}.png", 1
    while path.exists() and path.read_bytes() != content:  # the file was edited
        copies += 1
        path = folder / f"{name}-{copies}.png"
    if not path.exists():
        write_file(path, content)
    return str(path.absolute())
