"""Your own data: a folder with a list of samples, or with images and masks of equal names.

- `samples.jsonl`: one object a line with image, mask, prompt, and where you have them references (paths, or objects
  with image, and mask or box: a list, or a single one), level, group, family, id (or sample_id), split, think, rule,
  answer;
- `samples.csv`: the same as columns; references are paths separated by ";", each `IMAGE` or `IMAGE|MASK`;
- `images/` and `masks/` with equal stems, and the prompt in `prompt.txt`.

Paths are relative to the folder. A `split` limits a row to that split; rows without it belong to every split. A sample
whose files are missing fails alone, as a damaged one does. This is also what `ConceptShapes.export` writes.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..files import FileItem, FileReference, Index
from ..paths import MissingFilesError, inside, read_text
from ..suite import Source
from ..truths import MaskFile, PixelBox

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LEVEL, GROUP = "CR", "own data"


def index_files(root: Path, source: Source, split: str) -> Index:
    """Lists the samples; see `Index`."""
    if (root / "samples.jsonl").is_file():
        rows = _jsonl_rows(root / "samples.jsonl")
    elif (root / "samples.csv").is_file():
        rows = _csv_rows(root / "samples.csv")
    elif (root / "images").is_dir() and (root / "masks").is_dir():
        return Index(_folder_items(root, source), partial=True)
    else:
        raise MissingFilesError(
            f"load_benchmark: {source.name!r} finds neither samples.jsonl nor samples.csv nor images/ with masks/ in "
            f"{str(root)!r}; add one of them.",
            (("index", root / "samples.jsonl"),),
            1,
        )
    items = [
        _item(root, source, where, row) for where, row in rows if str(row.get("split") or split) == split
    ]
    seen: set[str] = set()
    for item in items:
        if item.sample_id in seen:
            raise ValueError(
                f"{str(root)!r} has two samples with the id {item.sample_id!r}; give each its own."
            )
        seen.add(item.sample_id)
    return Index(items, partial=True)


def _item(root: Path, source: Source, where: str, row: dict[str, Any]) -> FileItem:
    lacking = [
        name for name in ("image", "mask", "prompt") if not isinstance(row.get(name), str) or not row[name]
    ]
    if lacking:
        raise ValueError(f"{where} has no {lacking[0]}; give image, mask and prompt, all as text.")
    image = inside(root, row["image"])
    return FileItem(
        sample_id=str(row.get("sample_id") or row.get("id") or Path(row["image"]).with_suffix("").as_posix()),
        image=image,
        truth=MaskFile(inside(root, row["mask"])),
        prompt=row["prompt"],
        level=row.get("level") or LEVEL,
        group=row.get("group") or GROUP,
        family=row.get("family") or source.name,
        references=_references(root, where, row.get("references") or []),
        **{name: row.get(name) or None for name in ("think", "rule", "answer")},
    )


def _references(root: Path, where: str, references: Any) -> tuple[FileReference, ...]:
    if isinstance(references, (str, dict)):
        references = [references]
    if not isinstance(references, list):
        raise ValueError(f"{where} has references that are no list; give a list of paths or objects.")
    return tuple(_reference(root, where, reference) for reference in references)


def _reference(root: Path, where: str, reference: Any) -> FileReference:
    if isinstance(reference, str):
        return FileReference(inside(root, reference))
    if not isinstance(reference, dict) or not isinstance(reference.get("image"), str):
        raise ValueError(f"{where} has a reference without image; give a path, or an object with image.")
    image = inside(root, reference["image"])
    if reference.get("box") is not None:
        try:
            x1, y1, x2, y2 = map(float, reference["box"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where} has a reference whose box is not four numbers; give x1, y1, x2, y2."
            ) from error
        return FileReference(image, PixelBox((x1, y1, x2, y2)))
    mask = reference.get("mask")
    return FileReference(image, None if mask is None else MaskFile(inside(root, mask)))


def _jsonl_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON; write one object a line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object; write one object a line.")
        rows.append((where, row))
    return rows


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for row in reader:
        references = []
        for entry in filter(None, map(str.strip, (row.get("references") or "").split(";"))):
            image, _, mask = entry.partition("|")
            references.append({"image": image, "mask": mask} if mask else image)
        rows.append((f"line {reader.line_num} of {path.name}", row | {"references": references}))
    return rows


def _folder_items(root: Path, source: Source) -> list[FileItem]:
    prompt_path = root / "prompt.txt"
    prompt = read_text(prompt_path).strip() if prompt_path.is_file() else ""
    if not prompt:
        raise ValueError(f"{str(root)!r} has images/ and masks/ but no prompt.txt; write the prompt there.")
    images, masks = _by_stem(root / "images"), _by_stem(root / "masks")
    return [
        FileItem(
            sample_id=stem,
            image=images.get(stem, root / "images" / f"{stem}.*"),
            truth=MaskFile(masks.get(stem, root / "masks" / f"{stem}.png")),
            prompt=prompt,
            level=LEVEL,
            group=GROUP,
            family=source.name,
        )
        for stem in sorted({*images, *masks})
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _IMAGES:
            if path.stem in found:
                raise ValueError(f"{str(folder)!r} has two pictures named {path.stem!r}; keep one of them.")
            found[path.stem] = path
    return found
