"""Several datasets of photographs below one folder, each in the layout `plain`, as one benchmark.

Every subfolder with `samples.jsonl` or `samples.csv` is a dataset of that name. Samples without listed references get
references from the train split of the same dataset and prompt. The datasets take turns in the order of the samples, so
that the first N samples are of all datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from ..files import FileItem, Index
from ..paths import MissingFilesError, is_hidden
from ..pools import ClassPool, FileReference
from ..suite import Source
from . import plain

TRAIN = "train"


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of a split in all datasets; see `Index`.

    Raises:
        MissingFilesError: If no subfolder lists samples.
        ValueError: If a row is malformed, an id is used twice, or no sample is in the split.
    """
    items: dict[str, list[FileItem]] = {}
    pool: dict[str, list[FileReference]] = {}
    counts: dict[str, int] = {}
    for item, item_split in _all_items(root, source):
        counts[item_split] = counts.get(item_split, 0) + 1
        if item_split == TRAIN and not item.references:
            pool.setdefault(item.concept, []).append(FileReference(item.image, item.ground_truth))
        if item_split == split:
            items.setdefault(item.dataset, []).append(item)
    if not items:
        raise ValueError(plain.describe_missing_split(source, split, dict(sorted(counts.items()))))
    turns = zip_longest(*items.values())
    return Index([item for turn in turns for item in turn if item is not None], ClassPool(pool), partial=True)


def list_splits(root: Path, source: Source) -> tuple[str, ...]:
    """Return the splits of all datasets."""
    return tuple(sorted({split for _, split in _all_items(root, source)}))


def _all_items(root: Path, source: Source) -> Iterator[tuple[FileItem, str]]:
    """Iterate over the samples of all datasets with their splits."""
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not is_hidden(folder)]
    folders = [folder for folder in folders if any((folder / name).is_file() for name in plain.LISTS)]
    if not folders:
        raise MissingFilesError(
            f"load_benchmark: {source.name!r} has no subfolder with samples.jsonl or samples.csv in {str(root)!r}; "
            "give the folder that contains the datasets.",
            (("index", root / "*" / plain.LISTS[0]),),
            1,
        )
    for folder in folders:
        dataset = replace(source, name=folder.name)
        listed = plain.list_items(folder, dataset)
        plain.check_ids(folder, ((split, item.sample_id) for item, split in listed))
        for item, split in listed:
            yield (
                replace(
                    item,
                    sample_id=f"{folder.name}/{item.sample_id}",
                    dataset=folder.name,
                    concept=f"{folder.name}/{item.prompt}",
                ),
                split,
            )
