"""Benchmarks by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ..suggestions import did_you_mean
from .concept_shapes import ConceptShapes
from .files import LOADERS, FileBenchmark
from .layouts import LAYOUTS, LISTED_SPLITS
from .layouts.authors import drop_reference_boxes
from .paths import existing_folder
from .sample import ConceptSample
from .suite import SOURCES, Source

PROCEDURAL = {"concept-shapes": ConceptShapes}
"""Benchmarks that read no files."""

BENCHMARKS = (*PROCEDURAL, *SOURCES)
"""Every name that `load_benchmark` knows."""


def load_benchmark(
    name: str,
    root: str | os.PathLike | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 42,
    loader: str = "default",
    groups: Sequence[str] | None = None,
) -> Sequence[ConceptSample]:
    """Loads a benchmark.

    Samples of files are read when they are asked for; that their files are there is checked at once.

    Args:
        name: One of `BENCHMARKS`; `suite.SOURCES` says what each is, how its files lie, and where they are published.
        root: Folder of its files; None for `"concept-shapes"`, which is drawn from seeds.
        split: A split of that benchmark; "test" also names the split that is evaluated where its own name is another.
        limit: Only the first samples of the split.
        seed: Seed by which references are drawn, where samples come without any of their own, or are drawn themselves.
        loader: How the files of a benchmark are read: `"default"`, or `"released"` as the released code does. Of
            references drawn from a class there are four, with replacement, by one source of chance for all samples;
            boxes of references that come with a sample (`ref_box`) are left out; true masks keep their grey values for
            the protocol "released".
        groups: Of `"concept-shapes"`, the groups to go round; see `ConceptShapes`.

    Raises:
        ValueError: If no benchmark, split, loader or group has that name, the split has no samples, or the files are
            not what they should be.
        MissingFilesError: If files are missing: all of them, with counts. (Of one's own data: if no sample has all of
            its files; fewer are warned of, and fail when they are read.)
        ImportError: If a layout needs a package that is missing.
    """
    if loader not in LOADERS:
        raise ValueError(f"load_benchmark: loader is {loader!r}; use {' or '.join(map(repr, LOADERS))}.")
    if name in PROCEDURAL:
        if root is not None:
            raise ValueError(
                f"load_benchmark: {name!r} is drawn from seeds and reads no files; leave root out."
            )
        return PROCEDURAL[name](split, length=limit, seed=seed, groups=groups)
    if groups is not None:
        raise ValueError(
            f"load_benchmark: {name!r} cannot be divided into groups; leave groups out, or name another benchmark."
        )
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
    """As `load_benchmark`, for benchmarks of files, without looking for the files of the samples."""
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
    """What is known of a benchmark of files.

    Args:
        name: Its name.
        groups: Names of groups, where one of these could have been meant.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in SOURCES:
        meant = did_you_mean(name, (*BENCHMARKS, *groups))
        raise ValueError(
            f"load_benchmark: no benchmark is named {name!r}{meant}; use one of {', '.join(BENCHMARKS)}."
        )
    return SOURCES[name]


def list_splits(source: Source, root: str | os.PathLike | None) -> tuple[str, ...]:
    """The splits that are looked at where none is named: the paper's, else all, be it that only the data knows them.

    Raises:
        ValueError, OSError: If the data must be read for it, and cannot be.
    """
    known = source.paper_splits or tuple(source.counts)
    if not known and source.layout in LISTED_SPLITS:
        known = LISTED_SPLITS[source.layout](existing_folder(root, source.name), source)
    return known or ("test",)


def resolve_split(source: Source, split: str) -> str:
    """The split by its own name.

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
