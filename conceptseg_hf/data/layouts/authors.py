"""The datasets published by the authors of ConceptSeg-R1: `all_meta.json` next to one folder per dataset.

`{"train": {class: [item]}, "test": {class: [item]}}`; an item has `img_path` (a list: the last path is the target,
earlier ones are references), `mask_path`, `cls_name`, `dataset_name`, `task_name`, and in some datasets `problem` and
`ref_box`. All paths are relative to the folder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import ClassPool, FileItem, FileReference, Index
from ..ground_truths import BoxGroundTruth, MaskFile
from ..paths import inside, read_json, required_file
from ..suite import CLASS_NAME, Source

METADATA = "all_meta.json"
_FIELDS = ("img_path", "mask_path", "cls_name", "dataset_name")


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of one dataset of the tree; see `Index`."""
    path = required_file(root / METADATA, source.name)
    metadata = _read_metadata(path, path.stat().st_mtime_ns)
    items: list[FileItem] = []
    classes: set[str] = set()
    for concept, entries in metadata[split].items():
        for entry in entries:
            if entry["dataset_name"] == source.name:
                items.append(_item(root, source, split, len(items), concept, entry))
                classes.add(entry["cls_name"])
    pool = {
        concept: [
            FileReference(inside(root, entry["img_path"][0]), MaskFile(inside(root, entry["mask_path"])))
            for entry in metadata["train"].get(concept, ())
            if len(entry["img_path"]) == 1
        ]
        for concept in classes
    }
    return Index(items, ClassPool(pool))


def drop_reference_boxes(index: Index) -> Index:
    """Remove the boxes of listed references from an index: the released loader does not read `ref_box`."""
    items = [
        replace(
            item, references=tuple(replace(reference, ground_truth=None) for reference in item.references)
        )
        for item in index.items
    ]
    return replace(index, items=items)


def _item(
    root: Path, source: Source, split: str, number: int, concept: str, entry: dict[str, Any]
) -> FileItem:
    *references, target = (inside(root, path) for path in entry["img_path"])
    problem = entry.get("problem") if source.problem is None else source.problem
    if not isinstance(problem, str):
        raise ValueError(
            f"{METADATA}: an item of class {concept!r} of {source.name!r} has no problem; download the file again."
        )
    if problem == CLASS_NAME:
        problem = entry["cls_name"].replace(source.name, "").replace("_", " ").strip()
    group = source.group
    if source.name == "MGrounding" and "diff" in f"{entry.get('task_name')} {concept}".lower():
        group = "difference"
    return FileItem(
        sample_id=f"{number:06d}-{target.stem}",
        image=target,
        ground_truth=MaskFile(inside(root, entry["mask_path"])),
        prompt=problem,
        level=source.level,
        group=group,
        family=source.name,
        concept=entry["cls_name"],
        references=_own_references(references, entry, split),
    )


def _own_references(images: list[Path], entry: dict[str, Any], split: str) -> tuple[FileReference, ...]:
    """Return the references that are listed for an item.

    Boxes are used in training only: the released evaluation shows these references without boxes.
    """
    boxes = entry.get("ref_box") if split == "train" else None
    if not isinstance(boxes, list) or len(boxes) != len(images):
        return tuple(FileReference(image) for image in images)
    return tuple(
        FileReference(image, BoxGroundTruth(tuple(map(float, box)))) for image, box in zip(images, boxes)
    )


@lru_cache(maxsize=2)
def _read_metadata(path: Path, _modified: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Read and check the metadata; cached, because all datasets of the tree share it."""
    metadata = read_json(path)
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(split), dict) for split in ("train", "test")
    ):
        raise ValueError(f"{str(path)!r} has no objects 'train' and 'test'; download the file again.")
    for split in ("train", "test"):
        for concept, entries in metadata[split].items():
            if not isinstance(entries, list) or not all(map(_is_entry, entries)):
                raise ValueError(
                    f"{str(path)!r}: class {concept!r} of {split!r} has an item without {', '.join(_FIELDS)}; "
                    "download the file again."
                )
    return metadata


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(entry.get(name) for name in _FIELDS)
        and isinstance(entry["img_path"], list)
        and all(isinstance(entry[name], str) for name in _FIELDS[1:])
    )
