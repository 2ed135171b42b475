"""Which benchmarks a name stands for: one, a group of the paper's suite, or a list of both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .paths import MissingFilesError
from .registry import BENCHMARKS, get_source, load_benchmark
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
"""The rows of each group: all 23 sets of Table 5; the 20 of Table 1, which lie in the authors' tree; a level's."""

OTHERS = "*"
"""Stands, in a mapping of roots, for all benchmarks that it does not name."""

_NAMED = 3


@dataclass(frozen=True)
class BenchmarkGroup:
    """Several benchmarks that go together.

    Attributes:
        name: What they are called together.
        members: The samples of each, by its name and split.
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
    """Loads what a name stands for; that all files are there is checked at once.

    Args:
        name: A benchmark that `load_benchmark` knows, one of `GROUPS` in any case ("CD"), or several of these with
            commas between them.
        root: Folder of the files; or folders by the name of their benchmark, `OTHERS` for all that are not named.
        split: Split of benchmarks given by their own names; groups have the splits of the paper.
        limit: Only the first samples of each benchmark.
        seed: Seed of the references; see `load_benchmark`.
        loader: See `load_benchmark`.
        groups: Groups of the samples of a single benchmark; see `load_benchmark`.

    Returns:
        The samples of a single benchmark, or a group.

    Raises:
        ValueError: If a name, split or folder is none.
        MissingFilesError: If files are missing: of all benchmarks at once, with counts.
        ImportError: If a layout needs a package that is missing.
    """
    for key in root if isinstance(root, Mapping) else ():
        if key != OTHERS:
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
            f"load_benchmarks: {name!r} stands for several benchmarks; leave groups out, or name 'concept-shapes'."
        )
    rows = list_rows(name, split)
    members: dict[str, Sequence[ConceptSample]] = {}
    faults: list[tuple[str, Exception]] = []
    for row_name, row_split in rows:
        where = root_of(row_name, root) if row_name in SOURCES else None
        try:
            samples = load_benchmark(
                row_name, root=where, split=row_split or split, limit=limit, seed=seed, loader=loader
            )
            members[f"{row_name}-{row_split}"] = samples
        except (ValueError, OSError) as error:
            faults.append((row_name, error))
    if faults:
        raise _joined(faults, len(rows))
    return BenchmarkGroup(name, members)


def is_single(name: str) -> bool:
    """Whether a name stands for one benchmark, and for no group or list."""
    return "," not in name and name.strip().lower() not in GROUPS


def list_rows(name: str, split: str | None = "test") -> list[tuple[str, str | None]]:
    """Benchmark and split of everything that a name stands for, once each.

    Args:
        name: See `load_benchmarks`.
        split: Split of benchmarks given by their own names; None leaves it open.

    Raises:
        ValueError: If a name is none, or a group is given a split.
    """
    return list(dict.fromkeys(row for word in name.split(",") for row in _rows(word.strip(), split)))


def root_of(name: str, root: Root | Mapping[str, Root]) -> Root:
    """The folder of one benchmark; see `load_benchmarks`."""
    return root.get(name, root.get(OTHERS)) if isinstance(root, Mapping) else root


def _rows(word: str, split: str | None) -> Sequence[tuple[str, str | None]]:
    if word.lower() not in GROUPS:
        if word not in BENCHMARKS:
            get_source(word, GROUPS)  # says which there are
        if split is None or word not in SOURCES:
            return [(word, split)]
        return [(word, SOURCES[word].aliases.get(split, split))]
    if split not in (None, "test"):
        raise ValueError(
            f"load_benchmarks: the group {word!r} has the paper's splits; leave split {split!r} out, or name "
            "benchmarks instead."
        )
    return GROUPS[word.lower()]


def _joined(faults: Sequence[tuple[str, Exception]], total: int) -> Exception:
    """All that is wrong as one error; benchmarks with the same fault are named together."""
    if len(faults) == 1:
        return faults[0][1]
    reasons: dict[str, list[str]] = {}
    for name, error in faults:
        text = str(error).removeprefix("load_benchmark: ").removeprefix(f"{name!r} ").rstrip(".")
        reasons.setdefault(text.replace(repr(name), "it"), []).append(name)
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"{', '.join(names[:_NAMED])}{more}: {reason}")
    message = f"load_benchmarks: {len(faults)} of {total} benchmarks cannot be read ({' | '.join(parts)})."
    missing: tuple[tuple[str, Path], ...] = ()
    files = 0
    for _, error in faults:
        if isinstance(error, MissingFilesError):
            missing, files = (*missing, *error.missing), files + error.total
    return MissingFilesError(message, missing, files) if missing else ValueError(message)
