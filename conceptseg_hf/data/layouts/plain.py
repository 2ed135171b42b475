"""Your own data: a folder with a list of samples, or with images and masks of equal names; see docs/own_data.md.

- `samples.jsonl`: one object a line with image, mask, prompt, and where you have them references (paths, or objects
  with image, and mask or box: a list, or a single one), level, group, family, id (or sample_id), split, think, rule,
  answer;
- `samples.csv`: the same as columns; references are paths separated by ";", each `IMAGE` or `IMAGE|MASK`;
- `images/` and `masks/` with equal stems, and the prompt in `prompt.txt`.

Paths are relative to the folder. Where no row names a split, all rows are in every split; where some do, the others are
in "test". A sample whose files are missing fails alone, as a damaged one does. This is also what `ConceptShapes.export`
writes.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import FileItem, FileReference, Index
from ..ground_truths import MaskFile, PixelBox
from ..paths import MissingFilesError, composed, inside, is_hidden, read_text
from ..suite import Source

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RARE_IMAGES = (
    ".gif",
    ".heic",
    ".heif",
    ".avif",
)  # which Pillow may need help for; used where there is no other
LEVEL, GROUP = "CR", "own data"
DEFAULT_SPLIT = "test"


Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its fields."""


def index_files(root: Path, source: Source, split: str) -> Index:
    """Lists the samples of a split; see `Index`.

    Raises:
        ValueError: If a row is malformed, or no sample is in the split.
    """
    rows = _read_rows(root, source)
    if rows is None:
        items = _folder_items(root, source)
        _warn_of_no_splits(source, split, len(items), "images/ and masks/ have no splits")
        return Index(items, partial=True)
    counts = _count_splits(rows)
    if not rows:
        raise ValueError(f"load_benchmark: {str(root)!r} lists no samples; write one row for each.")
    if counts and split not in counts:
        named = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
        raise ValueError(f"load_benchmark: {source.name!r} has no split {split!r}; its rows are in {named}.")
    if not counts:
        _warn_of_no_splits(source, split, len(rows), "no row names a split")
    else:
        unnamed = sum(not _split_of(row) for _, row in rows)
        if unnamed:
            warnings.warn(
                f"{source.name}: {unnamed} of {len(rows)} rows name no split and count as {DEFAULT_SPLIT!r}; give each "
                "row its split.",
                stacklevel=2,
            )
    items = [
        _item(root, source, where, row)
        for where, row in rows
        if not counts or (_split_of(row) or DEFAULT_SPLIT) == split
    ]
    seen: set[str] = set()
    for item in items:
        if item.sample_id in seen:
            raise ValueError(
                f"{str(root)!r} has two samples with the id {item.sample_id!r}; give each its own."
            )
        seen.add(item.sample_id)
    return Index(items, partial=True)


def list_splits(root: Path, source: Source) -> tuple[str, ...]:
    """The splits that rows name; none where no row does."""
    return tuple(_count_splits(_read_rows(root, source) or ()))


def _read_rows(root: Path, source: Source) -> list[Row] | None:
    """The rows of the list; None where images/ and masks/ stand for it."""
    if (root / "samples.jsonl").is_file():
        return _jsonl_rows(root / "samples.jsonl")
    if (root / "samples.csv").is_file():
        return _csv_rows(root / "samples.csv")
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return None
    raise MissingFilesError(
        f"load_benchmark: {source.name!r} finds neither samples.jsonl nor samples.csv nor images/ with masks/ in "
        f"{str(root)!r}; add one of them.",
        (("index", root / "samples.jsonl"),),
        1,
    )


def _split_of(row: dict[str, Any]) -> str:
    return str(row.get("split") or "").strip()


def _count_splits(rows: Sequence[Row]) -> dict[str, int]:
    """Rows of each split; nothing where no row names one."""
    named = Counter(_split_of(row) for _, row in rows)
    unnamed = named.pop("", 0)
    if named and unnamed:
        named[DEFAULT_SPLIT] += unnamed
    return dict(named)


def _warn_of_no_splits(source: Source, split: str, count: int, reason: str) -> None:
    """Training and evaluation would share such samples; evaluation alone, of the default split, needs no splits."""
    if split != DEFAULT_SPLIT:
        warnings.warn(
            f"{source.name}: {reason}, so all {count} samples are in {split!r} as in every other split, and an "
            "evaluation would run on the images of a training; give each row of samples.jsonl a split.",
            stacklevel=3,
        )


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
        ground_truth=MaskFile(inside(root, row["mask"])),
        prompt=row["prompt"],
        level=row.get("level") or LEVEL,
        group=row.get("group") or GROUP,
        family=row.get("family") or source.name,
        references=_references(root, where, row.get("references") or []),
        think=row.get("think") or None,
        rule=row.get("rule") or None,
        answer=row.get("answer") or None,
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
    if not images and not masks:
        raise ValueError(
            f"load_benchmark: images/ and masks/ in {str(root)!r} hold no images; put {', '.join(_IMAGES)} files there."
        )
    return [
        FileItem(
            sample_id=(images.get(stem) or masks[stem]).stem,
            image=images.get(stem, root / "images" / f"{stem}.*"),
            ground_truth=MaskFile(masks.get(stem, root / "masks" / f"{stem}.png")),
            prompt=prompt,
            level=LEVEL,
            group=GROUP,
            family=source.name,
        )
        for stem in sorted({*images, *masks})
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by their stems, whose accents may be written in either Unicode form."""
    found: dict[str, Path] = {}
    paths = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    for path in paths:
        if path.suffix.lower() in _IMAGES:
            stem = composed(path.stem)
            if stem in found:
                raise ValueError(f"{str(folder)!r} has two pictures named {stem!r}; keep one of them.")
            found[stem] = path
    for path in paths:
        if path.suffix.lower() in _RARE_IMAGES:
            found.setdefault(composed(path.stem), path)
    return found
