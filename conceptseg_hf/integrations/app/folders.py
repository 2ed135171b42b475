"""Segmentation of uploaded images one after the other, and an archive of the results."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...outputs import ConceptSegmentation
from ...writing import image_bytes, json_text
from .uploads import UploadError, read_upload


@dataclass(frozen=True)
class ImageOutcome:
    """Result of one uploaded file.

    Attributes:
        name: Name of the file, without folders.
        image: The image; None if it cannot be read.
        result: The result; its `error` says why an image failed.
    """

    name: str
    image: Image.Image | None
    result: ConceptSegmentation


def segment_images(
    paths: Sequence[str], segment: Callable[[Image.Image], ConceptSegmentation]
) -> Iterator[ImageOutcome]:
    """Segment uploaded files; a file that cannot be read gives an outcome with an error.

    Args:
        paths: The files.
        segment: Segments one image.
    """
    for path in paths:
        name = Path(path).name
        try:
            image = read_upload(path)
        except UploadError as error:
            yield ImageOutcome(name, None, ConceptSegmentation.failed(str(error)))
            continue
        yield ImageOutcome(name, image, segment(image))


def write_archive(path: Path, outcomes: Iterable[ImageOutcome]) -> Path:
    """Write a zip archive with a mask per image and `results.json`.

    Names in the archive start with a number and contain no folders.

    Args:
        path: The archive.
        outcomes: The results.
    """
    records: list[dict[str, Any]] = []
    with zipfile.ZipFile(path, "w") as archive:
        for number, outcome in enumerate(outcomes, start=1):
            record = {"image": outcome.name, "mask": None, **outcome.result.to_dict()}
            record.pop("heatmap", None)
            if outcome.result.mask is not None:
                stem = re.sub(r"[^\w.-]+", "_", Path(outcome.name).stem).strip(".")[:80]
                record["mask"] = f"{number:04d}_{stem}_mask.png"
                archive.writestr(record["mask"], image_bytes(outcome.result.mask))
            records.append(record)
        archive.writestr("results.json", json_text(records, indent=2) + "\n")
    return path
