"""MIG-Bench as published by its owners: `MIG_data.json` next to `images/`.

Items have the keys task, images, question, answer (x1, y1, x2, y2 from 0 to 1), additional_info and need_format. The
answer is a box; there are no masks. The target is the last image, as in the metadata of ConceptSeg-R1; the two tasks in
which it can be any image (group grounding, region locating) are not in the paper and are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import FileItem, FileReference, Index
from ..ground_truths import BoxGroundTruth
from ..paths import inside, read_json, required_file
from ..suite import Source
from .grounding import below, without_markup

# Group of the paper's Table 1 for each task.
GROUPS = {
    "common_object": "consistency",
    "correspondence": "consistency",
    "refer_grounding": "consistency",
    "diff": "difference",
    "view_diff": "difference",
    "reasoning": "rationality",
    "multi_view": "spatio-temporality",
    "object_tracking": "spatio-temporality",
}
_SKIPPED_TASKS = ("group_grounding", "region")


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples; see `Index`."""
    path = required_file(root / "MIG_data.json", source.name)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} is not a list of items; download the file again.")
    return Index(
        [
            _item(root, source, number, entry)
            for number, entry in enumerate(entries)
            if not isinstance(entry, dict) or entry.get("task") not in _SKIPPED_TASKS
        ]
    )


def _item(root: Path, source: Source, number: int, entry: Any) -> FileItem:
    try:
        task, question = entry["task"], without_markup(entry["question"])
        images = [inside(root, below(root, image, "MIG-Bench")) for image in entry["images"]]
        x1, y1, x2, y2 = map(float, entry["answer"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"item {number} of MIG_data.json lacks task, images, question or answer; download the file again."
        ) from error
    if not images:
        raise ValueError(f"item {number} of MIG_data.json has no images; download the file again.")
    *references, target = images
    return FileItem(
        sample_id=f"{number:06d}-{task}",
        image=target,
        ground_truth=BoxGroundTruth((x1, y1, x2, y2)),
        prompt=question,
        level=source.level,
        group=GROUPS.get(task, task),
        family=task,
        references=tuple(map(FileReference, references)),
    )
