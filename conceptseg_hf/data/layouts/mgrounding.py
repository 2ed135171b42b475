"""MGrounding-630k as published by its owners: `MGrounding-630k.json` next to the image folders.

Items have the keys id, images, conversations (alternating "human" and "gpt") and type. An answer with exactly one box,
`<|box_start|>(x1,y1),(x2,y2)<|box_end|>` from 0 to 1000, is a sample; answers with several boxes or none are skipped.
The target is the image that the answer names ("It's in the third image"), or else the last one. There are no masks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..files import FileItem, FileReference, Index
from ..ground_truths import BoxGroundTruth
from ..paths import inside, read_json, required_file
from ..suite import Source
from .grounding import below, named_image, without_markup

_BOX = re.compile(r"<\|box_start\|>\(\s*([\d.]+),\s*([\d.]+)\),\s*\(([\d.]+),\s*([\d.]+)\)")
_FULL_SCALE = 1000.0


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples; see `Index`."""
    name = "MGrounding-630k.json"
    inner = root / "MGrounding-630k" / name
    path = required_file(inner if inner.is_file() else root / name, source.name)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} is not a list of items; download the file again.")
    return Index(
        [item for number, entry in enumerate(entries) for item in _items(root, source, number, entry)]
    )


def _items(root: Path, source: Source, number: int, entry: Any) -> list[FileItem]:
    try:
        images = [inside(root, below(root, image, "MGrounding-630k")) for image in entry["images"]]
        values = [turn["value"] for turn in entry["conversations"]]
        kind = str(entry.get("type", "mgrounding"))
        turns = [
            (without_markup(question), answer, _BOX.findall(answer))
            for question, answer in zip(values[::2], values[1::2])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"item {number} of MGrounding-630k.json lacks images or conversations; download the file again."
        ) from error
    items = []
    for turn_index, (question, answer, boxes) in enumerate(turns):
        if len(boxes) != 1 or not images:
            continue
        target = named_image(answer, len(images))
        target = len(images) - 1 if target is None else target
        items.append(
            FileItem(
                sample_id=f"{number:06d}-{turn_index}",
                image=images[target],
                ground_truth=BoxGroundTruth(tuple(float(value) / _FULL_SCALE for value in boxes[0])),
                prompt=question,
                level=source.level,
                group="difference" if "diff" in kind.lower() else "consistency",
                family=kind,
                references=tuple(FileReference(image) for i, image in enumerate(images) if i != target),
            )
        )
    return items
