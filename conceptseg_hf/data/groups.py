"""Benchmark names: single benchmarks, groups of the paper's suite, and comma-separated lists of these."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .paths import MissingFilesError
from .registry import BENCHMARKS, COMPOSED, PROCEDURAL, get_source, load_benchmark
from .sample import ConceptSample
from .suite import AUTHORS, SOURCES, SUITE

Root = str | os.PathLike | None

_ROWS = tuple((name, split) for name in SUITE for split in SOURCES[name].paper_splits if split != "train")
"""Benchmark and split of each evaluation set of the paper."""

GROUPS = {
    "all": _ROWS,
    "table1": tuple(row for row in _ROWS if SOURCES[row[0]].published == AUTHORS),
    **{
        level.lower(): tuple(row for row in _ROWS if SOURCES[row[0]].level == level)
        for level in ("CI", "CD", "CR")
    },
}
"""Rows of each group: the 23 sets of Table 5, the 20 sets of Table 1 (the authors' data), the sets of each level."""

OTHERS = "*"
"""Key for all benchmarks that are not listed in a mapping of roots."""

_MAX_LISTED = 3  # benchmarks listed for each error


@dataclass(frozen=True)
class BenchmarkGroup:
    """Several benchmarks that are evaluated together.

    Attributes:
        name: Name of the group.
        members: Samples of each benchmark, by name and split.
    """

    name: str
    members: Mapping[str, Sequence[ConceptSample]]


def load_benchmarks(
    name: str,
    root: Root | Mapping[str, Root] = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 42,
    loader: str = "default",
    groups: Sequence[str] | None = None,
) -> Sequence[ConceptSample] | BenchmarkGroup:
    """Load one or several benchmarks, and check that all of their files exist.

    Args:
        name: A benchmark that `load_benchmark` accepts, one of `GROUPS` in any case ("CD"), or a comma-separated list
            of these.
        root: Folder of the files, or a mapping from benchmark names to folders, with the key `OTHERS` for all
            benchmarks that are not listed.
        split: Split of benchmarks given by their own names; groups use the splits of the paper.
        limit: Maximum number of samples of each benchmark.
        seed: Random seed of the references; see `load_benchmark`.
        loader: See `load_benchmark`.
        groups: Groups of samples of a single benchmark; see `load_benchmark`.

    Returns:
        The samples of a single benchmark, or a `BenchmarkGroup`.

    Raises:
        ValueError: If a name, split or folder does not exist.
        MissingFilesError: If files are missing; the error counts them for all benchmarks.
        ImportError: If a layout needs a package that is not installed.
    """
    for key in root if isinstance(root, Mapping) else ():
        if key not in (OTHERS, *COMPOSED):
            get_source(key)
    if is_single(name):
        name = name.strip()
        if name not in BENCHMARKS:
            get_source(name, GROUPS)
        return load_benchmark(
            name, root=root_of(name, root), split=split, limit=limit, seed=seed, loader=loader, groups=groups
        )
    if groups is not None:
        raise ValueError(
            f"load_benchmarks: {name!r} stands for several benchmarks; leave groups out, or use 'concept-shapes'."
        )
    rows = list_rows(name, split)
    members: dict[str, Sequence[ConceptSample]] = {}
    faults: list[tuple[str, Exception]] = []
    for row_name, row_split in rows:
        row_root = None if row_name in PROCEDURAL else root_of(row_name, root)
        try:
            samples = load_benchmark(
                row_name, root=row_root, split=row_split or split, limit=limit, seed=seed, loader=loader
            )
            members[f"{row_name}-{row_split}"] = samples
        except (ValueError, OSError) as error:
            faults.append((row_name, error))
    if faults:
        raise _combine_errors(faults, len(rows))
    return BenchmarkGroup(name, members)


def is_single(name: str) -> bool:
    """Whether a name refers to a single benchmark rather than a group or a list."""
    return "," not in name and name.strip().lower() not in GROUPS


def list_rows(name: str, split: str | None = "test") -> list[tuple[str, str | None]]:
    """List the benchmarks and splits that a name refers to, without duplicates.

    Args:
        name: See `load_benchmarks`.
        split: Split of benchmarks given by their own names; None leaves it unspecified.

    Raises:
        ValueError: If a name does not exist, or a split is given for a group.
    """
    return list(dict.fromkeys(row for part in name.split(",") for row in _rows(part.strip(), split)))


def root_of(name: str, root: Root | Mapping[str, Root]) -> Root:
    """Return the folder of one benchmark; see `load_benchmarks`."""
    return root.get(name, root.get(OTHERS)) if isinstance(root, Mapping) else root


def _rows(name: str, split: str | None) -> Sequence[tuple[str, str | None]]:
    if name.lower() not in GROUPS:
        if name not in BENCHMARKS:
            get_source(name, GROUPS)  # raises an error that lists the available names
        if split is None or name not in SOURCES:
            return [(name, split)]
        return [(name, SOURCES[name].aliases.get(split, split))]
    if split not in (None, "test"):
        raise ValueError(
            f"load_benchmarks: the group {name!r} uses the paper's splits; leave split {split!r} out, or list "
            "benchmarks instead."
        )
    return GROUPS[name.lower()]


def _combine_errors(faults: Sequence[tuple[str, Exception]], total: int) -> Exception:
    """Combine the errors of several benchmarks into one; benchmarks with the same error are listed together."""
    if len(faults) == 1:
        return faults[0][1]
    reasons: dict[str, list[str]] = {}
    for name, error in faults:
        text = str(error).removeprefix("load_benchmark: ").removeprefix(f"{name!r} ").rstrip(".")
        reasons.setdefault(text.replace(repr(name), "it"), []).append(name)
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        parts.append(f"{', '.join(names[:_MAX_LISTED])}{more}: {reason}")
    message = f"load_benchmarks: {len(faults)} of {total} benchmarks cannot be read ({' | '.join(parts)})."
    missing: tuple[tuple[str, Path], ...] = ()
    files = 0
    for _, error in faults:
        if isinstance(error, MissingFilesError):
            missing, files = (*missing, *error.missing), files + error.total
    return MissingFilesError(message, missing, files) if missing else ValueError(message)
