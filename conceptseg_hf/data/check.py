"""What of benchmarks is there, what is missing, and whether they are the sets that the paper counts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .files import describe_names
from .groups import Root, is_single, list_rows, root_of
from .inspection import Inspection, inspect_files
from .paths import MissingFilesError, check_files, existing_folder
from .registry import PROCEDURAL, get_source, list_splits, load_benchmark, open_benchmark, resolve_split

_NAMED = 5


@dataclass(frozen=True)
class DataCheck:
    """The state of one split.

    Attributes:
        name: The benchmark.
        split: The split.
        found: Samples that the index lists.
        images: Different target images among them.
        expected: What the paper counts (samples, or images where `counts_images`), None if it does not.
        counts_images: Whether `expected` counts images.
        files: Files that were looked for; 0 where there are none.
        is_drawn: The benchmark is drawn from seeds and reads no files.
        missing: Pairs of kind and path of those that are missing.
        without_references: Classes whose samples can have no reference.
        inspection: What is wrong with the files that are there.
        fault: One sentence, if the index itself cannot be read.
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

    @property
    def matches(self) -> bool | None:
        """Whether the count is the paper's; None if the paper gives none."""
        if self.expected is None:
            return None
        return self.expected == (self.images if self.counts_images else self.found)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or unusable and no count differs."""
        usable = self.fault is None and not self.missing and self.inspection.is_usable
        return usable and self.found > 0 and self.matches is not False

    def lines(self) -> list[str]:
        """What a person must know, line by line."""
        title = f"{self.name}, {self.split}:"
        if self.fault is not None:
            return [f"{title} {self.fault}"]
        lines = [f"{title} {self.found} samples of {self.images} images", f"  {self._count_line()}"]
        if self.missing:
            kinds = Counter(kind for kind, _ in self.missing)
            counted = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"  missing: {len(self.missing)} of {self.files} files ({counted})")
            lines += [f"    {path}" for _, path in self.missing[:_NAMED]]
            if len(self.missing) > _NAMED:
                lines.append(f"    and {len(self.missing) - _NAMED} more")
        elif self.is_drawn:
            lines.append("  files: it is drawn from seeds and needs none")
        elif self.files:
            lines.append(f"  files: all {self.files} are there")
        lines += self.inspection.lines()
        if self.without_references:
            lines.append(f"  references: {describe_names(self.without_references)} none")
        return lines

    def _count_line(self) -> str:
        if self.matches is None:
            return "count: the paper gives none"
        unit = "images" if self.counts_images else "samples"
        return (
            f"count: the paper has {self.expected} {unit}: {'the same' if self.matches else 'another count'}"
        )


def check_benchmarks(
    name: str,
    root: Root | Mapping[str, Root] = None,
    split: str | None = None,
    seed: int = 42,
    progress: bool = False,
) -> list[DataCheck]:
    """Looks for everything that one or several benchmarks need, and tries whether it can be used.

    Args:
        name: What `load_benchmarks` takes: a benchmark, a group of the suite, or several with commas between them.
        root: Folder of the files, or folders by the name of their benchmark; see `load_benchmarks`.
        split: Split of benchmarks given by their own names; None: see `check_benchmark`.
        seed: Seed of the references.
        progress: Show a progress bar on a terminal.

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
    return list(dict.fromkeys(checks))  # a benchmark may be named alone and by its group


def check_benchmark(
    name: str,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    seed: int = 42,
    progress: bool = False,
) -> list[DataCheck]:
    """Looks for everything that a benchmark needs, and tries whether it can be used.

    Of target images only the headers are read; true masks, and all references that a seed may draw, are read whole.

    Args:
        name: A benchmark.
        root: The folder of its files, if it reads any.
        split: One split; None: those of the paper, or all if the paper has none.
        seed: Seed of the references.
        progress: Show a progress bar on a terminal.

    Returns:
        One result per split.

    Raises:
        ValueError: If no benchmark, split or folder has that name.
        ImportError: If a layout needs a package that is missing.
    """
    if name in PROCEDURAL:
        drawn = split or "test"
        samples = load_benchmark(name, root, drawn, seed=seed)
        return [DataCheck(name, drawn, found=len(samples), images=len(samples), is_drawn=True)]
    source = get_source(name)
    existing_folder(root, name)
    if split is not None:
        splits: tuple[str, ...] = (resolve_split(source, split),)
    else:
        try:
            splits = list_splits(source, root)
        except (OSError, ValueError):  # what is wrong is said of the split that is always looked for
            splits = ("test",)
    return [_check_split(name, root, each, seed, progress) for each in splits]


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
    lacking = {path for _, path in missing}
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
        inspection=inspect_files(samples, lacking, f"{name}, {split}" if progress else None),
    )


def _without_caller(error: Exception) -> str:
    return str(error).removeprefix("load_benchmark: ")
