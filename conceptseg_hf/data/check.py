"""Check which files of benchmarks exist, and whether the sample counts match the paper."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .duplicates import Duplicates, find_duplicates
from .files import describe_names
from .groups import Root, is_single, list_rows, root_of
from .inspection import Inspection, inspect_files
from .paths import MissingFilesError, check_files, existing_folder
from .registry import (
    GENERATED,
    PROCEDURAL,
    get_source,
    list_splits,
    load_benchmark,
    open_benchmark,
    resolve_split,
)

_MAX_LISTED = 5  # missing files listed in a report
_TRAIN = "train"


@dataclass(frozen=True)
class DataCheck:
    """Result of checking one split.

    Attributes:
        name: Name of the benchmark.
        split: Name of the split.
        found: Number of samples in the index.
        images: Number of distinct target images among them.
        expected: Number of samples in the paper (of images if `counts_images`); None if the paper gives none.
        counts_images: Whether `expected` counts images.
        files: Number of files that were checked.
        is_drawn: Whether the benchmark is generated from random seeds and reads no files.
        missing: Pairs of kind and path of the missing files.
        without_references: Classes that have no reference image.
        inspection: Faults of the existing files.
        fault: Error message (one sentence) if the index cannot be read; else None.
        root: Folder of the files; None if the benchmark reads none.
        duplicates: Images that are duplicates of training images; None if the train split was not checked as well.
    """

    name: str
    split: str
    found: int = 0
    images: int = 0
    expected: int | None = None
    counts_images: bool = False
    files: int = 0
    is_drawn: bool = False
    missing: tuple[tuple[str, Path], ...] = ()
    without_references: tuple[str, ...] = ()
    inspection: Inspection = field(default_factory=Inspection)
    fault: str | None = None
    root: Path | None = None
    duplicates: Duplicates | None = None

    @property
    def matches(self) -> bool | None:
        """Whether the count equals that of the paper; None if the paper gives none."""
        if self.expected is None:
            return None
        return self.expected == (self.images if self.counts_images else self.found)

    @property
    def complete(self) -> bool:
        """Whether no file is missing or unusable and the count does not differ from that of the paper."""
        usable = self.fault is None and not self.missing and self.inspection.is_usable
        return usable and self.found > 0 and self.matches is not False

    def lines(self) -> list[str]:
        """Return the report, line by line."""
        title = f"{self.name}, {self.split}:"
        if self.fault is not None:
            return [f"{title} {self.fault}"]
        lines = [f"{title} {self.found} samples of {self.images} images", f"  {self._count_line()}"]
        if self.missing:
            kinds = Counter(kind for kind, _ in self.missing)
            counted = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"  missing: {len(self.missing)} of {self.files} files ({counted})")
            lines += [f"    {path}" for _, path in self.missing[:_MAX_LISTED]]
            if len(self.missing) > _MAX_LISTED:
                lines.append(f"    and {len(self.missing) - _MAX_LISTED} more")
        elif self.is_drawn:
            lines.append("  files: generated from random seeds, needs none")
        elif self.files:
            lines.append(f"  files: all {self.files} exist")
        lines += self.inspection.lines()
        if self.without_references:
            lines.append(f"  references: {describe_names(self.without_references)} none")
        if self.duplicates is not None and self.root is not None:
            lines += self.duplicates.lines(self.root)
        return lines

    def _count_line(self) -> str:
        if self.matches is None:
            return "count: not given in the paper"
        unit = "images" if self.counts_images else "samples"
        return f"count: {'matches' if self.matches else 'differs from'} the paper ({self.expected} {unit})"


def check_benchmarks(
    name: str,
    root: Root | Mapping[str, Root] = None,
    split: str | None = None,
    seed: int = 42,
    progress: bool = False,
) -> list[DataCheck]:
    """Check that all files of one or several benchmarks exist and can be used.

    Args:
        name: A benchmark, a group of the suite, or a comma-separated list of these, as in `load_benchmarks`.
        root: Folder of the files, or a mapping from benchmark names to folders; see `load_benchmarks`.
        split: Split of benchmarks given by their own names; for None, see `check_benchmark`.
        seed: Random seed of the references.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        One result per benchmark and split.

    Raises:
        ValueError, ImportError: See `check_benchmark`.
    """
    if is_single(name):
        return check_benchmark(name.strip(), root_of(name.strip(), root), split, seed, progress)
    checks = (
        check
        for row_name, row_split in list_rows(name, split)
        for check in check_benchmark(
            row_name, None if row_name in PROCEDURAL else root_of(row_name, root), row_split, seed, progress
        )
    )
    return list(dict.fromkeys(checks))  # a benchmark may be listed both by name and by its group


def check_benchmark(
    name: str,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    seed: int = 42,
    progress: bool = False,
) -> list[DataCheck]:
    """Check that all files of a benchmark exist and can be used.

    Only the headers of target images are read. Ground-truth masks, and all references that any seed may draw, are
    read completely. If the train split is among the splits, the images of all splits are read, and those of the other
    splits are compared with the training images (see `duplicates`).

    Args:
        name: Name of the benchmark.
        root: Folder of its files, if it reads any.
        split: Split to check; None checks the splits of the paper, or all splits if the paper uses none.
        seed: Random seed of the references.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        One result per split.

    Raises:
        ValueError: If the benchmark, split or folder does not exist.
        ImportError: If a layout needs a package that is not installed.
    """
    if name in GENERATED:
        split = split or "test"
        samples = load_benchmark(name, root, split, seed=seed)
        return [DataCheck(name, split, found=len(samples), images=len(samples), is_drawn=True)]
    source = get_source(name)
    existing_folder(root, name)
    if split is not None:
        splits: tuple[str, ...] = (resolve_split(source, split),)
    else:
        try:
            splits = list_splits(source, root)
        except (OSError, ValueError):  # the error is reported for the default split
            splits = ("test",)
    checks = [_check_split(name, root, each, seed, progress) for each in splits]
    if not any(check.split == _TRAIN and check.found for check in checks):
        return checks
    return [_with_duplicates(check, root, seed, progress) for check in checks]


def _with_duplicates(
    check: DataCheck, root: str | os.PathLike | None, seed: int, progress: bool
) -> DataCheck:
    """Compare the images of a split with the training images."""
    if check.split == _TRAIN or not check.found:
        return check
    samples, train = (open_benchmark(check.name, root, split, seed=seed) for split in (check.split, _TRAIN))
    bar = f"{check.name}, duplicates" if progress else None
    return replace(check, duplicates=find_duplicates(samples, train, bar))


def _check_split(
    name: str, root: str | os.PathLike | None, split: str, seed: int, progress: bool
) -> DataCheck:
    source = get_source(name)
    try:
        samples = open_benchmark(name, root, split, seed=seed)
        samples.check_length()
    except MissingFilesError as error:
        return DataCheck(name, split, missing=error.missing, files=error.total, fault=_without_caller(error))
    except ValueError as error:
        return DataCheck(name, split, fault=_without_caller(error))
    files = list(samples.files())
    try:
        check_files(files, name, samples.root)
        missing: tuple[tuple[str, Path], ...] = ()
    except MissingFilesError as error:
        missing = error.missing
    missing_paths = {path for _, path in missing}
    return DataCheck(
        name,
        split,
        found=len(samples),
        images=len({item.image for item in samples.items}),
        expected=source.counts.get(split),
        counts_images=source.counts_images,
        files=len({path for _, path in files}),
        missing=missing,
        without_references=samples.without_references,
        inspection=inspect_files(samples, missing_paths, f"{name}, {split}" if progress else None),
        root=samples.root,
    )


def _without_caller(error: Exception) -> str:
    return str(error).removeprefix("load_benchmark: ")
