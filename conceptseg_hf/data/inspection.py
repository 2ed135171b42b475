"""What is wrong with those files of a benchmark that are there: damaged ones, other sizes, unusable references."""

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

_NAMED = 5
_BATCH = 1024  # files that are handed to the threads at once


@dataclass(frozen=True)
class Inspection:
    """What reading has shown; each fault is a sentence that names its file.

    Attributes:
        samples: How many samples were looked at.
        unusable: What is wrong with samples whose image or true mask cannot be used.
        resized: True masks of another size than their image that are resized to it.
        references: How many references were read: all that samples may have, whatever the seed.
        unusable_references: What is wrong with those that cannot be used.
        rotated: Images that EXIF data rotates or mirrors beside a mask that has no such data.
    """

    samples: int = 0
    unusable: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    references: int = 0
    unusable_references: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether every sample and every reference can be used."""
        return not self.unusable and not self.unusable_references

    def lines(self) -> list[str]:
        """What a person must know, line by line."""
        lines = []
        if self.unusable:
            lines.append(f"  samples: {len(self.unusable)} of {self.samples} cannot be used")
            lines += _first(self.unusable)
        if self.resized:
            lines.append(
                f"  true masks: {len(self.resized)} have nearly the size of their image and are resized to it"
            )
            lines += _first(self.resized)
        if self.unusable_references:
            count = len(self.unusable_references)
            lines.append(
                f"  references: {count} of {self.references} cannot be used; others of their class take their places, "
                "and where there are none samples have fewer"
            )
            lines += _first(self.unusable_references)
        elif self.references:
            lines.append(f"  references: all {self.references} can be used")
        if self.rotated:
            lines.append(
                f"  EXIF: {len(self.rotated)} images are rotated or mirrored by it and their masks are not; masks must "
                "be of the image as it is shown"
            )
            lines += _first(self.rotated)
        return lines


@dataclass(frozen=True)
class _Finding:
    """What reading one sample has shown."""

    fault: str | None = None
    resized: str | None = None
    rotated: str | None = None


def inspect_files(
    samples: FileBenchmark, missing: Collection[Path] = (), progress: str | None = None
) -> Inspection:
    """Reads what samples need: of images the headers, true masks and references whole.

    Args:
        samples: The samples.
        missing: Files that are known to be missing; what needs them is passed over.
        progress: What a progress bar is called; None: there is none.
    """
    items = _different(item for item in samples.items if item.image not in missing)
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
        warnings.simplefilter("ignore")  # what they say is in the findings
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
        unusable=_said(finding.fault for finding in findings),
        resized=_said(finding.resized for finding in findings),
        references=len(references),
        unusable_references=_said(faults),
        rotated=_said(finding.rotated for finding in findings),
    )


def _different(items: Iterator[FileItem]) -> list[FileItem]:
    """Items with different files: the classes of one map of labels are read once."""
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
    rest = iter(values)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _said(sentences: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentence for sentence in sentences if sentence is not None))


def _first(sentences: Sequence[str]) -> list[str]:
    more = [f"    and {len(sentences) - _NAMED} more"] if len(sentences) > _NAMED else []
    return [*(f"    {sentence}" for sentence in sentences[:_NAMED]), *more]
