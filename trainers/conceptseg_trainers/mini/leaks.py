"""Training photographs that show what a test photograph shows, which are not trained on."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from conceptseg_hf.data import FileBenchmark, load_benchmark
from conceptseg_hf.data.duplicates import MAX_DISTANCE, fingerprints, nearest
from conceptseg_hf.data.files import FileItem
from conceptseg_hf.data.layouts.photos import index_files
from conceptseg_hf.data.suite import SOURCES

# The magnetic tiles have several exposures each, and the split of the data does not separate tiles. The numbers in the
# file names ascend in time; images whose numbers are less than this apart are taken to be of the same tile.
_TILE_GAP = 1300
_TILES = "magnetic-tile"


@functools.lru_cache(maxsize=4)
def training_items(root: Path) -> tuple[FileItem, ...]:
    """Return the training samples of the benchmark `photos` without those that leak test photographs.

    Left out are images that are duplicates or near duplicates of a test image of any dataset (see
    `data.duplicates`), and exposures of a magnetic tile that is in the test split.

    Args:
        root: Folder of the benchmark.
    """
    train, test = (index_files(root, SOURCES["photos"], split).items for split in ("train", "test"))
    images = _images(train)
    test_images = _images(test)
    matches = nearest(fingerprints(images), fingerprints(test_images))
    leaks = {
        image
        for image, match in zip(images, matches, strict=True)
        if match is not None and (match[2] or match[1] <= MAX_DISTANCE)
    }
    tiles = [[image for image in each if image.parts[-3] == _TILES] for each in (images, test_images)]
    leaks |= _same_tiles(*tiles)
    return tuple(item for item in train if item.image not in leaks)


def training_benchmark(root: Path) -> FileBenchmark:
    """Return the train split of the benchmark `photos` with the samples of `training_items`."""
    samples = load_benchmark("photos", root, "train")
    assert isinstance(samples, FileBenchmark)
    samples.items = list(training_items(root))
    return samples


def _images(items: Iterable[FileItem]) -> list[Path]:
    return list(dict.fromkeys(item.image for item in items))


def groups_of(numbers: Sequence[int], gap: int = _TILE_GAP) -> list[int]:
    """Return the group of each number: a group ends where the next larger number is at least `gap` away."""
    group_of, group = {}, 0
    ordered = sorted(set(numbers))
    for previous, number in zip([*ordered[:1], *ordered], ordered):
        group += number - previous >= gap
        group_of[number] = group
    return [group_of[number] for number in numbers]


def tile_number(name: str) -> int | None:
    """Return the number in the file name of a magnetic tile; None if it has none."""
    match = re.search(r"_num_(\d+)", name)
    return None if match is None else int(match[1])


def _same_tiles(images: Sequence[Path], test_images: Sequence[Path]) -> set[Path]:
    """Return the images of tiles that test images show as well."""
    numbers = {image: tile_number(image.name) for image in (*images, *test_images)}
    known = {image: number for image, number in numbers.items() if number is not None}
    groups = dict(zip(known, groups_of(list(known.values())), strict=True))
    tested = {groups[image] for image in test_images if image in groups}
    return {image for image in images if groups.get(image) in tested} - set(test_images)
