"""Results in other formats: a COCO file, and masks as PNG files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..evaluation.records.rle import decode_mask
from ..images import mask_to_image
from ..writing import image_bytes, json_text, open_new, write_file
from .job import BatchJob
from .output import OutputFolder
from .rows import Row

FORMATS = ("parquet", "coco", "png")
COCO, MASKS = "coco.json", "masks"

_COLUMNS = ["index", "image", "width", "height", "score", "route", "mask", "mask_area", "mask_box", "error"]
_PER_FOLDER = 1000


def export(output: OutputFolder, job: BatchJob, format: str) -> list[Path]:
    """Write the results of a finished job in another format, with one shard in memory at a time.

    Args:
        output: The output folder.
        job: The job.
        format: One of `FORMATS`.

    Returns:
        The file or folder that was written; empty for "parquet".
    """
    if format == "coco":
        return [_write_coco(output, job)]
    if format == "png":
        return [_write_masks(output)]
    return []


def _write_coco(output: OutputFolder, job: BatchJob) -> Path:
    """Write one annotation per mask with a foreground; failed images have no size, but an error."""
    path = output.folder / COCO
    with open_new(path) as file:
        categories = [{"id": 1, "name": job.text}]
        file.write(f'{{"categories": {json_text(categories)},\n"images": [')
        for number, row in enumerate(output.read(_COLUMNS)):
            file.write(("" if number == 0 else ",") + "\n" + json_text(_coco_image(row)))
        file.write('\n],\n"annotations": [')
        number = 0
        for row in output.read(_COLUMNS):
            if row["mask_box"] is not None:
                number += 1
                file.write(("" if number == 1 else ",") + "\n" + json_text(_coco_annotation(row, number)))
        file.write("\n]}\n")
    return path


def _coco_image(row: Row) -> dict[str, Any]:
    image = {
        "id": row["index"],
        "file_name": row["image"],
        "width": row["width"],
        "height": row["height"],
        "route": row["route"],
    }
    return image if row["error"] is None else image | {"error": row["error"]}


def _coco_annotation(row: Row, number: int) -> dict[str, Any]:
    x1, y1, x2, y2 = row["mask_box"]
    return {
        "id": number,
        "image_id": row["index"],
        "category_id": 1,
        "segmentation": row["mask"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": row["mask_area"],
        "score": row["score"],
        "iscrowd": 0,
    }


def _write_masks(output: OutputFolder) -> Path:
    folder = output.folder / MASKS
    for row in output.read(_COLUMNS):
        if row["mask"] is not None:
            path = folder / mask_path(row["index"], row["image"])
            write_file(path, image_bytes(mask_to_image(decode_mask(row["mask"]))))
    return folder


def mask_path(index: int, name: str) -> Path:
    """Return the path of a mask, which is unique and contains the name of its image as far as file systems allow."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name.split("?")[0]).stem)[:80]
    return Path(f"{index // _PER_FOLDER:05d}", f"{index:08d}-{stem}.png")
