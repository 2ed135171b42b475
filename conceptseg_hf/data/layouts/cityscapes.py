"""Cityscapes as published by its owners, in two trees with one folder per split and city.

`leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` are the images, `gtFine/SPLIT/CITY/*_gtFine_labelIds.png` the label maps.
Each of the 19 evaluated classes in an image is one sample; pixels with other labels are ignored. The classes in an
image are known only from its label map, so listing a split reads all of its label maps once.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..files import FileItem, FileReference, Index, ReferencePool, reference_count
from ..ground_truths import LabelFile, read_labels
from ..paths import MissingFilesError, check_files, is_hidden
from ..suite import Source

# Label ids of the 19 classes that are evaluated, in the order of their training ids.
CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_LABELS = frozenset(CLASSES.values())
_IGNORED = frozenset(range(256)) - _LABELS
_MAX_REFERENCES = 4
_IMAGE, _MAP = "_leftImg8bit.png", "_gtFine_labelIds.png"


class StreetPool(ReferencePool):
    """Draws training images, and reads their label maps until enough of them contain the class.

    Args:
        pairs: Images and label maps.
    """

    reads_files = True

    def __init__(self, pairs: list[tuple[Path, Path]]) -> None:
        self._pairs = pairs

    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """See `ReferencePool.draw`."""
        drawn: list[FileReference] = []
        label, class_size = CLASSES[concept], 0
        for image, labels in rng.sample(self._pairs, len(self._pairs)):
            if self._may_show(label, labels):
                class_size += 1
                if image != exclude:
                    drawn.append(FileReference(image, LabelFile(labels, label)))
            if len(drawn) == _MAX_REFERENCES:
                return drawn
        return drawn[
            : reference_count(class_size)
        ]  # all label maps were read, so the size of the class is known

    def spares(
        self, concept: str, rng: random.Random, exclude: Path, drawn: Collection[FileReference]
    ) -> Iterator[FileReference]:
        """See `ReferencePool.spares`."""
        for reference in self._references(CLASSES[concept], rng.sample(self._pairs, len(self._pairs))):
            if reference.image != exclude and reference not in drawn:
                yield reference

    def references(self, concept: str) -> Iterator[FileReference]:
        """See `ReferencePool.references`."""
        return self._references(CLASSES[concept], self._pairs)

    def _references(self, label: int, pairs: Sequence[tuple[Path, Path]]) -> Iterator[FileReference]:
        for image, labels in pairs:
            if self._may_show(label, labels):
                yield FileReference(image, LabelFile(labels, label))

    @staticmethod
    def _may_show(label: int, labels: Path) -> bool:
        """Whether a label map contains a label; True if it cannot be read, which fails when the reference is read."""
        present = _present_or_unknown(labels)
        return present is None or label in present

    def has_reference(self, concept: str, exclude: Path) -> bool:
        """See `ReferencePool.has_reference`."""
        return any(image != exclude for image, _ in self._pairs)


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of a split; see `Index`."""
    pairs = _pairs(root, split)
    if not pairs:
        folder = root / "leftImg8bit" / split
        raise MissingFilesError(
            f"load_benchmark: {source.name!r} lacks images below {str(folder)!r}; put leftImg8bit and gtFine there.",
            (("folder", folder),),
            1,
        )
    check_files(
        (pair for image, labels in pairs for pair in (("image", image), ("mask", labels))), source.name, root
    )
    items = []
    for image, labels in pairs:
        for concept, label in CLASSES.items():
            # A label map that cannot be read gives one sample, which raises an error when it is read.
            if label in (_present_or_unknown(labels) or {CLASSES["road"]}):
                items.append(
                    FileItem(
                        sample_id=f"{image.name.removesuffix(_IMAGE)}-{concept.replace(' ', '_')}",
                        image=image,
                        ground_truth=LabelFile(labels, label, _IGNORED),
                        prompt=concept,
                        level=source.level,
                        group=source.group,
                        family=source.name,
                        concept=concept,
                    )
                )
    return Index(items, StreetPool([pair for pair in _pairs(root, "train") if pair[1].is_file()]))


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """List the paths of images and label maps of a split, including pairs with one file missing."""
    images, maps = root / "leftImg8bit" / split, root / "gtFine" / split
    stems = {
        path.relative_to(folder).as_posix().removesuffix(ending)
        for folder, ending in ((images, _IMAGE), (maps, _MAP))
        for path in folder.glob(f"*/*{ending}")
        if not is_hidden(path)
    }
    return [(images / f"{stem}{_IMAGE}", maps / f"{stem}{_MAP}") for stem in sorted(stems)]


def _present_or_unknown(path: Path) -> frozenset[int] | None:
    try:
        return _present(path)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _present(path: Path) -> frozenset[int]:
    """Return the evaluated labels in a label map."""
    return _LABELS.intersection(np.unique(read_labels(path)).tolist())
