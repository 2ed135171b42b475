"""Inspection of the files of a benchmark: damaged files, masks of different size, unusable references."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..mask_checks import describe_size_mismatch
from ..progress import progress_bar
from .files import FileBenchmark, FileItem, read_ground_truth
from .ground_truths import LabelFile, MaskFile
from .pools import FileReference

_MAX_LISTED = 5  # faults listed in a report
_BATCH = 1024  # files that are submitted to the threads at once


@dataclass(frozen=True)
class Inspection:
    """Result of reading the files of a benchmark; each fault is a sentence with the name of the file.

    Attributes:
        samples: Number of samples that were inspected.
        unusable: Faults of samples with an unusable image or ground-truth mask.
        resized: Ground-truth masks that are resized because their size differs from that of their image.
        references: Number of references that were read: all that any seed may draw.
        unusable_references: Faults of references that cannot be used.
        rotated: Images that are rotated or mirrored by EXIF data while their mask has no EXIF data.
    """

    samples: int = 0
    unusable: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    references: int = 0
    unusable_references: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether all samples and references can be used."""
        return not self.unusable and not self.unusable_references

    def lines(self) -> list[str]:
        """Return the report, line by line."""
        lines = []
        if self.unusable:
            lines.append(f"  samples: {len(self.unusable)} of {self.samples} cannot be used")
            lines += _first_lines(self.unusable)
        if self.resized:
            lines.append(
                f"  ground-truth masks: {len(self.resized)} differ in size from their image and are resized to it"
            )
            lines += _first_lines(self.resized)
        if self.unusable_references:
            count = len(self.unusable_references)
            lines.append(
                f"  references: {count} of {self.references} cannot be used; they are replaced by other images of "
                "their class if there are any"
            )
            lines += _first_lines(self.unusable_references)
        elif self.references:
            lines.append(f"  references: all {self.references} can be used")
        if self.rotated:
            lines.append(
                f"  EXIF: {len(self.rotated)} images are rotated or mirrored by their EXIF orientation and their masks "
                "are not; masks must match the image as displayed"
            )
            lines += _first_lines(self.rotated)
        return lines


@dataclass(frozen=True)
class _Finding:
    """Result of reading one sample."""

    fault: str | None = None
    resized: str | None = None
    rotated: str | None = None


def inspect_files(
    samples: FileBenchmark, missing: Collection[Path] = (), progress: str | None = None
) -> Inspection:
    """Read the headers of target images, and all ground-truth masks and references.

    Args:
        samples: The samples.
        missing: Files that are known to be missing; samples and references that need them are skipped.
        progress: Description of the progress bar; None shows no progress bar.
    """
    items = _with_distinct_files(item for item in samples.items if item.image not in missing)
    items = [item for item in items if not any(path in missing for path in item.ground_truth.files)]
    references = [
        reference
        for reference in samples.all_references()
        if not any(path in missing for path in reference.files)
    ]
    total = len(items) + len(references)
    workers = min(8, os.cpu_count() or 1)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as threads,
        nullcontext() if progress is None else progress_bar(total, "files", progress) as bar,
    ):
        warnings.simplefilter("ignore")  # the findings contain these messages
        findings, faults = [], []
        for batch in _batches(items):
            for finding in threads.map(_inspect_item, batch):
                findings.append(finding)
                if bar is not None:
                    bar.update()
        for batch in _batches(references):
            for fault in threads.map(_inspect_reference, batch):
                faults.append(fault)
                if bar is not None:
                    bar.update()
    return Inspection(
        samples=len(items),
        unusable=_unique(finding.fault for finding in findings),
        resized=_unique(finding.resized for finding in findings),
        references=len(references),
        unusable_references=_unique(faults),
        rotated=_unique(finding.rotated for finding in findings),
    )


def _with_distinct_files(items: Iterator[FileItem]) -> list[FileItem]:
    """Return items with distinct files: a label map of several classes is read once."""
    seen: dict[tuple[object, ...], FileItem] = {}
    for item in items:
        ground_truth = (
            item.ground_truth.path if isinstance(item.ground_truth, LabelFile) else item.ground_truth
        )
        seen.setdefault((item.image, ground_truth), item)
    return list(seen.values())


def _inspect_item(item: FileItem) -> _Finding:
    try:
        item.read_fields()
        size, orientation = item.read_header()
        ground_truth = read_ground_truth(item.ground_truth, size, orientation)
    except (OSError, ValueError) as error:
        return _Finding(fault=str(error))
    rotated = (
        str(item.image) if orientation != 1 and isinstance(item.ground_truth, (MaskFile, LabelFile)) else None
    )
    if ground_truth.fault is not None:
        return _Finding(fault=ground_truth.fault, rotated=rotated)
    if ground_truth.fitted is ground_truth.stored:
        return _Finding(rotated=rotated)
    stored = ground_truth.stored["mask"].size
    return _Finding(resized=describe_size_mismatch(item.ground_truth.name, stored, size), rotated=rotated)


def _inspect_reference(reference: FileReference) -> str | None:
    try:
        reference.read()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _batches(values: Sequence) -> Iterator[list]:
    remaining = iter(values)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _unique(sentences: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentence for sentence in sentences if sentence is not None))


def _first_lines(sentences: Sequence[str]) -> list[str]:
    more = [f"    and {len(sentences) - _MAX_LISTED} more"] if len(sentences) > _MAX_LISTED else []
    return [*(f"    {sentence}" for sentence in sentences[:_MAX_LISTED]), *more]
