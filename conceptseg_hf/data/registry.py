"""Registry of benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ..suggestions import did_you_mean
from .concept_photos import ConceptPhotos
from .concept_shapes import ConceptShapes
from .files import LOADERS, FileBenchmark
from .layouts import LAYOUTS, LISTED_SPLITS
from .layouts.authors import drop_reference_boxes
from .paths import existing_folder
from .sample import ConceptSample
from .suite import SOURCES, Source

PROCEDURAL = {"concept-shapes": ConceptShapes}
"""Benchmarks that are generated and read no files."""

COMPOSED = {"concept-photos": ConceptPhotos}
"""Benchmarks that are composed of the files of another benchmark, whose folder they need."""

GENERATED = (*PROCEDURAL, *COMPOSED)
"""Benchmarks whose samples are generated."""

BENCHMARKS = (*GENERATED, *SOURCES)
"""All names that `load_benchmark` accepts."""


def load_benchmark(
    name: str,
    root: str | os.PathLike | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 42,
    loader: str = "default",
    groups: Sequence[str] | None = None,
) -> Sequence[ConceptSample]:
    """Load a benchmark.

    Samples are read from files on access; whether the files exist is checked immediately.

    Args:
        name: One of `BENCHMARKS`; `suite.SOURCES` describes each set, its file layout and where it is published.
        root: Folder of its files; None for `"concept-shapes"`, which is generated from random seeds. `"concept-photos"`
            is composed of the files of `"photos"`.
        split: A split of the benchmark; "test" also refers to the split that is evaluated if that has another name.
        limit: Maximum number of samples, taken from the start of the split.
        seed: Random seed of references that are drawn from a class or generated. References listed for a sample do not
            depend on it.
        loader: How the files of a benchmark are read: `"default"`, or `"released"` as in the released code. With
            `"released"`, four references are drawn from a class with replacement, by one random generator for all
            samples; boxes of listed references (`ref_box`) are dropped; ground-truth masks keep their gray values for
            the protocol "released".
        groups: Groups of `"concept-shapes"` to generate; see `ConceptShapes`.

    Raises:
        ValueError: If the benchmark, split, loader or group does not exist, the split has no samples, or a file is
            malformed.
        MissingFilesError: If files are missing; the error counts and lists all of them. (For the benchmark "plain":
            only if no sample has all of its files; otherwise a warning is issued, and incomplete samples fail when they
            are read.)
        ImportError: If a layout needs a package that is not installed.
    """
    if loader not in LOADERS:
        raise ValueError(f"load_benchmark: loader is {loader!r}; use {' or '.join(map(repr, LOADERS))}.")
    if name in PROCEDURAL:
        if root is not None:
            raise ValueError(
                f"load_benchmark: {name!r} is generated from random seeds and reads no files; leave root out."
            )
        return PROCEDURAL[name](split, length=limit, seed=seed, groups=groups)
    if groups is not None:
        raise ValueError(
            f"load_benchmark: {name!r} has no groups; leave groups out, or use 'concept-shapes'."
        )
    if name in COMPOSED:
        return COMPOSED[name](existing_folder(root, name), split, length=limit, seed=seed)
    samples = open_benchmark(name, root, split, limit, seed, loader)
    samples.check()
    return samples


def open_benchmark(
    name: str,
    root: str | os.PathLike | None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 42,
    loader: str = "default",
) -> FileBenchmark:
    """Load a benchmark of files as `load_benchmark` does, without checking that the files of its samples exist."""
    source = get_source(name)
    if limit is not None and limit < 1:
        raise ValueError(f"load_benchmark: limit is {limit}; use at least 1.")
    folder = existing_folder(root, name)
    split = resolve_split(source, split)
    index = LAYOUTS[source.layout](folder, source, split)
    if loader == "released" and source.layout == "authors":
        index = drop_reference_boxes(index)
    return FileBenchmark(name, split, index, folder, limit, seed, loader)


def get_source(name: str, groups: Iterable[str] = ()) -> Source:
    """Return the metadata of a benchmark of files.

    Args:
        name: Name of the benchmark.
        groups: Names of groups, which are included in suggestions for unknown names.

    Raises:
        ValueError: If no benchmark has that name.
    """
    if name not in SOURCES:
        suggestion = did_you_mean(name, (*BENCHMARKS, *groups))
        raise ValueError(
            f"load_benchmark: no benchmark is named {name!r}{suggestion}; use one of {', '.join(BENCHMARKS)}."
        )
    return SOURCES[name]


def list_splits(source: Source, root: str | os.PathLike | None) -> tuple[str, ...]:
    """Return the splits that are checked by default: those of the paper, or else all, read from the data if necessary.

    Raises:
        ValueError, OSError: If the data must be read and cannot be.
    """
    known = source.paper_splits or tuple(source.counts)
    if not known and source.layout in LISTED_SPLITS:
        known = LISTED_SPLITS[source.layout](existing_folder(root, source.name), source)
    return known or ("test",)


def resolve_split(source: Source, split: str) -> str:
    """Return the name of a split, with aliases resolved.

    Raises:
        ValueError: If the benchmark has no such split.
    """
    split = source.aliases.get(split, split)
    if source.counts and split not in source.counts:
        raise ValueError(
            f"load_benchmark: {source.name!r} has no split {split!r}{did_you_mean(split, source.counts)}; use one of "
            f"{', '.join(source.counts)}."
        )
    return split
