"""Custom data: a folder with a list of samples, or with images and masks of equal names; see docs/own_data.md.

- `samples.jsonl`: one JSON object per line with image, mask and prompt, and optionally references (a path, an object
  with image and mask or box, or a list of these), level, group, family, id (or sample_id), split, think, rule and
  answer;
- `samples.csv`: the same as columns; references are paths separated by ";", each `IMAGE` or `IMAGE|MASK`;
- `images/` and `masks/` with equal stems, and the prompt in `prompt.txt`.

Paths are relative to the folder. If no row has a split, all rows are in every split; if some rows have one, the other
rows are in "test". A sample with missing files fails individually, like a damaged one. `ConceptShapes.export` writes
this layout.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import FileItem, FileReference, Index
from ..ground_truths import MaskFile, PixelBox
from ..paths import MissingFilesError, composed, inside, is_hidden, read_text
from ..suite import Source

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Pillow may need plugins for these; they are used only if there is no other image of the same stem.
_RARE_IMAGES = (".gif", ".heic", ".heif", ".avif")
LISTS = ("samples.jsonl", "samples.csv")
LEVEL, GROUP = "CR", "own data"
DEFAULT_SPLIT = "test"


Row = tuple[str, dict[str, Any]]
"""Position of a row, for messages, and its fields."""


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of a split; see `Index`.

    Raises:
        ValueError: If a row is malformed, or no sample is in the split.
    """
    rows = _read_rows(root, source)
    if rows is None:
        items = _folder_items(root, source)
        _warn_about_missing_splits(source, split, len(items), "images/ and masks/ have no splits")
        return Index(items, partial=True)
    counts = _count_splits(rows)
    if not rows:
        raise ValueError(f"load_benchmark: {str(root)!r} lists no samples; write one row for each.")
    if counts and split not in counts:
        raise ValueError(describe_missing_split(source, split, counts))
    if not counts:
        _warn_about_missing_splits(source, split, len(rows), "no row has a split")
    else:
        unnamed = sum(not _split_of(row) for _, row in rows)
        if unnamed:
            warnings.warn(
                f"{source.name}: {unnamed} of {len(rows)} rows have no split and are in {DEFAULT_SPLIT!r}; give each "
                "row a split.",
                stacklevel=2,
            )
    items = [
        _item(root, source, where, row)
        for where, row in rows
        if not counts or (_split_of(row) or DEFAULT_SPLIT) == split
    ]
    check_ids(root, ((split, item.sample_id) for item in items))
    return Index(items, partial=True)


def list_splits(root: Path, source: Source) -> tuple[str, ...]:
    """Return the splits of the rows; empty if no row has one."""
    return tuple(_count_splits(_read_rows(root, source) or ()))


def list_items(root: Path, source: Source) -> list[tuple[FileItem, str]]:
    """Return all samples of a list with their splits.

    Raises:
        MissingFilesError: If there is no list.
        ValueError: If a row is malformed.
    """
    return [
        (_item(root, source, f"{root.name}: {where}", row), _split_of(row) or DEFAULT_SPLIT)
        for where, row in _read_rows(root, source) or ()
    ]


def check_ids(root: Path, ids: Iterable[tuple[str, str]]) -> None:
    """Raise a ValueError if an id, given as split and id, is used twice."""
    seen: set[tuple[str, str]] = set()
    for key in ids:
        if key in seen:
            raise ValueError(f"{str(root)!r} has two samples with the id {key[1]!r}; give each a unique id.")
        seen.add(key)


def describe_missing_split(source: Source, split: str, counts: Mapping[str, int]) -> str:
    """Return the error message for a split without rows; `counts` has the number of rows of each split."""
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
    return f"load_benchmark: {source.name!r} has no split {split!r}; its rows are in {listed}."


def _read_rows(root: Path, source: Source) -> list[Row] | None:
    """Read the rows of the list; None if there are images/ and masks/ instead."""
    for name, read in zip(LISTS, (_jsonl_rows, _csv_rows), strict=True):
        if (root / name).is_file():
            return read(root / name)
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return None
    raise MissingFilesError(
        f"load_benchmark: {source.name!r} has neither samples.jsonl nor samples.csv nor images/ with masks/ in "
        f"{str(root)!r}; add one of them.",
        (("index", root / "samples.jsonl"),),
        1,
    )


def _split_of(row: dict[str, Any]) -> str:
    return str(row.get("split") or "").strip()


def _count_splits(rows: Sequence[Row]) -> dict[str, int]:
    """Count the rows of each split; empty if no row has one."""
    named = Counter(_split_of(row) for _, row in rows)
    unnamed = named.pop("", 0)
    if named and unnamed:
        named[DEFAULT_SPLIT] += unnamed
    return dict(named)


def _warn_about_missing_splits(source: Source, split: str, count: int, reason: str) -> None:
    """Warn that training and evaluation would use the same samples, unless only the default split is used."""
    if split != DEFAULT_SPLIT:
        warnings.warn(
            f"{source.name}: {reason}, so all {count} samples are in {split!r} as in every other split, and an "
            "evaluation would use the training images; give each row of samples.jsonl a split.",
            stacklevel=3,
        )


def _item(root: Path, source: Source, where: str, row: dict[str, Any]) -> FileItem:
    missing_fields = [
        name for name in ("image", "mask", "prompt") if not isinstance(row.get(name), str) or not row[name]
    ]
    if missing_fields:
        raise ValueError(f"{where} has no {missing_fields[0]}; give image, mask and prompt as strings.")
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
        raise ValueError(f"{where} has references that are not a list; give a list of paths or objects.")
    return tuple(_reference(root, where, reference) for reference in references)


def _reference(root: Path, where: str, reference: Any) -> FileReference:
    if isinstance(reference, str):
        return FileReference(inside(root, reference))
    if not isinstance(reference, dict) or not isinstance(reference.get("image"), str):
        raise ValueError(f"{where} has a reference without image; give a path, or an object with an image.")
    image = inside(root, reference["image"])
    if reference.get("box") is not None:
        try:
            x1, y1, x2, y2 = map(float, reference["box"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where} has a reference with a box that is not four numbers; give x1, y1, x2, y2."
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
            raise ValueError(f"{where} is not JSON; write one object per line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object; write one object per line.")
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
    """Return the images of a folder by their stems in NFC form."""
    paths_by_stem: dict[str, Path] = {}
    paths = [path for path in sorted(folder.iterdir()) if not is_hidden(path)]
    for path in paths:
        if path.suffix.lower() in _IMAGES:
            stem = composed(path.stem)
            if stem in paths_by_stem:
                raise ValueError(f"{str(folder)!r} has two images named {stem!r}; keep one of them.")
            paths_by_stem[stem] = path
    for path in paths:
        if path.suffix.lower() in _RARE_IMAGES:
            paths_by_stem.setdefault(composed(path.stem), path)
    return paths_by_stem
