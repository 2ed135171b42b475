"""Benchmarks that lie in files: an index of what there is, and samples that are read one by one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..boxes import mask_to_box
from ..images import is_file, load_oriented_image, mask_to_image, read_header
from ..mask_checks import describe_size_mismatch, is_similar_size
from ..references import Reference
from .ground_truths import BoxGroundTruth, GroundTruth, Size, resize
from .paths import check_files
from .pools import ClassPool, FileReference, ReferencePool, draw_with_replacement, reference_count
from .sample import ConceptSample, UnreadableSampleError

_NAMED = 3  # classes or samples that a message names

LOADERS = ("default", "released")
"""How references are drawn and masks are read; see `FileBenchmark`."""


@dataclass(frozen=True)
class FileItem:
    """What is known of a sample before anything is read.

    Attributes:
        sample_id: Unique within the benchmark and split.
        image: The target image.
        ground_truth: Its truth.
        prompt: The words.
        level: See `ConceptSample`, as `group`, `family`, `think`, `rule` and `answer`.
        concept: The class whose other images can serve as references.
        references: References of its own; without them they are drawn from the class.
    """

    sample_id: str
    image: Path
    ground_truth: GroundTruth
    prompt: str
    level: str
    group: str
    family: str
    concept: str = ""
    references: tuple[FileReference, ...] = ()
    think: str | None = None
    rule: str | None = None
    answer: str | None = None

    def read_fields(self) -> dict[str, Any]:
        """Those fields of the sample that need no pixels."""
        names = ("sample_id", "prompt", "level", "group", "family", "think", "rule", "answer")
        return {name: getattr(self, name) for name in names}

    def read_image(self) -> tuple[Image.Image, int]:
        """The target image, RGB and upright, and the EXIF orientation that was applied."""
        return load_oriented_image(self.image)

    def read_header(self) -> tuple[Size, int]:
        """(width, height) of the upright target image and its EXIF orientation, without its pixels where possible."""
        return read_header(self.image)


@dataclass(frozen=True)
class Index:
    """What a layout finds.

    Attributes:
        items: The samples of a split.
        pool: Where references are drawn from; None: samples have their own, or none.
        files: Further files that must be there, as pairs of kind and path.
        partial: Samples that lack files fail one by one, as damaged ones do; otherwise they refuse the whole set, whose
            numbers would not be its own without them.
    """

    items: Sequence[FileItem]
    pool: ReferencePool | None = None
    files: Sequence[tuple[str, Path]] = field(default_factory=tuple)
    partial: bool = False


@dataclass(frozen=True)
class LoadedReferences:
    """The references of an item, read.

    Attributes:
        files: Their files.
        references: What the processor takes, one for each.
        faults: What is wrong with those that were drawn and cannot be used, each naming its file.
        lost: How many of them nothing could replace.
    """

    files: list[FileReference]
    references: list[Reference]
    faults: tuple[str, ...]
    lost: int


@dataclass(frozen=True)
class LoadedGroundTruth:
    """A truth beside its image, as fields of a `ConceptSample`.

    Attributes:
        fitted: At the size of the image.
        stored: At the size it is stored in.
        fault: None, or why its size cannot be the image's.
    """

    fitted: dict[str, Any]
    stored: dict[str, Any]
    fault: str | None = None


class FileBenchmark(Sequence[ConceptSample]):
    """Samples that are read from files when they are asked for; nothing is kept.

    References are drawn from a seed and the sample's id: the same sample has the same references whatever else is read,
    in whatever order. With the loader `"released"` they are drawn as the released code does, with replacement and from
    one source of chance for all samples, in their order; and true masks keep their grey values (`soft_mask`).

    Args:
        name: Name of the benchmark.
        split: Its split.
        index: What there is.
        root: The folder of the files, for messages.
        limit: Only the first samples.
        seed: Seed of the references.
        loader: One of `LOADERS`.

    Attributes:
        items: What is known of the samples without reading them.
        without_references: The classes whose samples should have references and can have none.
    """

    def __init__(
        self,
        name: str,
        split: str,
        index: Index,
        root: Path,
        limit: int | None = None,
        seed: int = 42,
        loader: str = "default",
    ) -> None:
        self.name, self.split, self.root, self.seed, self.loader = name, split, root, seed, loader
        self.items = index.items if limit is None else index.items[:limit]
        self._pool, self._files, self._partial = index.pool, index.files, index.partial
        self._tried: dict[FileReference, Reference] = {}
        self._told: set[tuple[str, bool]] = set()
        self._drawn = self._draw_in_order() if loader == "released" else None
        self.without_references = self._classes_without_references()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        """Reads a sample.

        Raises:
            IndexError: If there is none at that place.
            UnreadableSampleError: If its image, its truth or its words cannot be read.
        """
        if isinstance(index, slice):
            raise TypeError(f"{self.name}: slices are not supported; use limit= or itertools.islice.")
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: index {index} is outside of 0..{len(self) - 1}.")
        item = self.items[index]
        fields: dict[str, Any] = {"sample_id": item.sample_id, "level": item.level, "group": item.group}
        fields |= {"family": item.family, "dataset": self.name, "split": self.split}
        try:
            fields |= item.read_fields()
            image, orientation = item.read_image()
        except (OSError, ValueError) as error:
            raise UnreadableSampleError(_because(item, error), fields, _ground_truth_or_none(item)) from error
        try:
            ground_truth = read_ground_truth(item.ground_truth, image.size, orientation)
            soft_mask = item.ground_truth.read_soft() if self.loader == "released" else None
        except (OSError, ValueError) as error:  # it may be that only its frame is the wrong one
            raise UnreadableSampleError(_because(item, error), fields, _ground_truth_or_none(item)) from error
        found = self.read_references(item)
        sample = ConceptSample(
            image=image,
            soft_mask=soft_mask,
            references=found.references,
            reference_faults=found.faults,
            references_lost=found.lost,
            **fields,
            **ground_truth.fitted,
        )
        if ground_truth.fault is not None:
            raise UnreadableSampleError(
                _because(item, ground_truth.fault), fields, ground_truth.stored, sample
            )
        return sample

    def __iter__(self) -> Iterator[ConceptSample]:
        for index in range(len(self)):
            yield self[index]

    def references_of(self, item: FileItem) -> list[FileReference]:
        """The references of an item, its own or those that the seed draws, whether they can be used or not."""
        return self._draw(item)[0]

    def _draw(self, item: FileItem) -> tuple[list[FileReference], random.Random | None]:
        """The references of an item, and the source of chance from which others can be drawn."""
        if item.references or self._pool is None:
            return list(item.references), None
        # A text seeds through a hash that is the same in every process and release.
        rng = random.Random(f"{self.seed}/{self.name}/{self.split}/{item.sample_id}")
        if self._drawn is not None:
            return self._drawn[item.sample_id], rng
        return self._pool.draw(item.concept, rng, item.image), rng

    def _draw_in_order(self) -> dict[str, list[FileReference]]:
        """The references of all samples that draw some, by sample id, from one source of chance."""
        if self._pool is None:
            return {}
        rng = random.Random(self.seed)
        items = [item for item in self.items if not item.references]
        classes = {
            concept: list(self._pool.references(concept))
            for concept in dict.fromkeys(item.concept for item in items)
        }
        return {item.sample_id: draw_with_replacement(classes[item.concept], rng, item.image) for item in items}

    def read_references(self, item: FileItem) -> LoadedReferences:
        """Reads the references of an item; others of its class take the places of those that cannot be used.

        Which ones do depends on seed and sample alone. A reference that is not usable is named once in a warning.
        """
        drawn, rng = self._draw(item)
        spares: Iterator[FileReference] | None = None
        files, references, faults = [], [], []
        for file in drawn:
            candidate: FileReference | None = file
            while candidate is not None:
                try:
                    references.append(self._read_reference(candidate))
                except (OSError, ValueError) as error:
                    faults.append(str(error))
                else:
                    files.append(candidate)
                    break
                if self._pool is None or rng is None:
                    break
                if spares is None:
                    spares = self._pool.spares(item.concept, rng, item.image, drawn)
                candidate = next(spares, None)
        found = LoadedReferences(files, references, tuple(faults), len(drawn) - len(files))
        self._warn_of(found, item)
        return found

    def _read_reference(self, file: FileReference) -> Reference:
        """A reference, read and tried; those that are paths are tried once."""
        if file not in self._tried:
            reference = file.read()
            if not isinstance(reference.image, Path) or isinstance(reference.mask, Image.Image):
                return reference
            self._tried[file] = reference
        return self._tried[file]

    def _warn_of(self, found: LoadedReferences, item: FileItem) -> None:
        for fault in found.faults:
            notified = (fault, found.lost > 0)
            if notified not in self._told:
                self._told.add(notified)
                warnings.warn(
                    f"{self.name}: a reference cannot be used, and others of its class take its place: {fault}"
                    if found.lost == 0
                    else f"{self.name}: a reference cannot be used, and there is no other to take its place, so that "
                    f"sample {item.sample_id!r} has {found.lost} fewer: {fault}",
                    stacklevel=4,
                )

    def all_references(self) -> list[FileReference]:
        """Everything that samples may have as a reference, whatever the seed, each once."""
        own = [reference for item in self.items for reference in item.references]
        if self._pool is None:
            return list(dict.fromkeys(own))
        concepts = dict.fromkeys(item.concept for item in self.items if not item.references)
        drawable = (reference for concept in concepts for reference in self._pool.references(concept))
        return list(dict.fromkeys([*own, *drawable]))

    def files(self) -> Iterator[tuple[str, Path]]:
        """All files that the samples need, as pairs of kind and path."""
        yield from self._files
        for item in self.items:
            yield from self._files_of(item)

    def _files_of(self, item: FileItem) -> Iterator[tuple[str, Path]]:
        yield "image", item.image
        yield from (("mask", path) for path in item.ground_truth.files)
        draws_freely = self._pool is None or not self._pool.reads_files
        for reference in self.references_of(item) if draws_freely else item.references:
            yield "reference image", reference.image
            if reference.ground_truth is not None:
                yield from (("reference mask", path) for path in reference.ground_truth.files)

    def check(self) -> None:
        """Checks that samples and files are there; warns of samples that lack files and classes without references.

        Raises:
            ValueError: If there are no samples.
            MissingFilesError: If files are missing (where samples may lack some: if no sample has all of its own); it
                counts and holds all of them.
        """
        self.check_length()
        if self._partial:
            self._warn_of_missing_files()
        else:
            check_files(self.files(), self.name, self.root)
        if self.without_references:
            count = sum(item.concept in self.without_references for item in self.items)
            warnings.warn(
                f"{self.name}: {describe_names(self.without_references)} no reference image in the train split "
                f"besides the target; {count} of {len(self)} samples come without references.",
                stacklevel=3,
            )

    def check_length(self) -> None:
        """Checks that there are samples.

        Raises:
            ValueError: If there are none.
        """
        if not self.items:
            raise ValueError(
                f"load_benchmark: {self.name!r} has no samples in split {self.split!r} below {str(self.root)!r}; "
                "give another split, or another root."
            )

    def _warn_of_missing_files(self) -> None:
        own = {item.sample_id: (item.image, *item.ground_truth.files) for item in self.items}
        lacking = [name for name, paths in own.items() if not all(map(is_file, paths))]
        if len(lacking) == len(self):
            check_files(self.files(), self.name, self.root)
        elif lacking:
            warnings.warn(
                f"{self.name}: {len(lacking)} of {len(self)} samples lack files ({_shown(lacking)}) and will fail; "
                "conceptseg data check names the files.",
                stacklevel=4,
            )

    def _classes_without_references(self) -> tuple[str, ...]:
        if self._pool is None:
            return ()
        missing = (
            item.concept
            for item in self.items
            if not item.references and not self._pool.has_reference(item.concept, item.image)
        )
        return tuple(dict.fromkeys(missing))


def describe_names(names: Sequence[str]) -> str:
    """Subject and verb: "class 'a' has", or "4 classes ('a', 'b', 'c', ...) have"."""
    if len(names) == 1:
        return f"class {names[0]!r} has"
    return f"{len(names)} classes ({_shown(names)}) have"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def read_ground_truth(ground_truth: GroundTruth, size: Size, orientation: int = 1) -> LoadedGroundTruth:
    """Reads a truth, and resizes it (nearest pixel) where its size is not the image's.

    Args:
        ground_truth: The truth.
        size: (width, height) of the image.
        orientation: EXIF orientation of the image.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    mask, ignore = ground_truth.read(size, orientation)
    found = mask.shape[::-1]
    stored = _ground_truth_fields(ground_truth, mask, ignore)
    if found == size:
        return LoadedGroundTruth(stored, stored)
    fitted = _ground_truth_fields(
        ground_truth, resize(mask, size), None if ignore is None else resize(ignore, size)
    )
    fitted["stored_mask"] = stored["mask"]
    fault = None if is_similar_size(found, size) else describe_size_mismatch(ground_truth.name, found, size)
    return LoadedGroundTruth(fitted, stored, fault)


def _ground_truth_fields(
    ground_truth: GroundTruth, mask: np.ndarray, ignore: np.ndarray | None
) -> dict[str, Any]:
    return {
        "mask": mask_to_image(mask),
        "box": ground_truth.box(mask.shape[::-1])
        if isinstance(ground_truth, BoxGroundTruth)
        else mask_to_box(mask),
        "ignore": None if ignore is None else mask_to_image(ignore),
        "box_only": ground_truth.box_only,
    }


def _ground_truth_or_none(item: FileItem) -> dict[str, Any] | None:
    try:
        return _ground_truth_fields(item.ground_truth, *item.ground_truth.read(None))
    except (OSError, ValueError):
        return None


def _because(item: FileItem, error: Exception | str) -> str:
    return f"sample {item.sample_id!r}: {error}"


__all__ = [
    "ClassPool",
    "FileBenchmark",
    "FileItem",
    "FileReference",
    "Index",
    "ReferencePool",
    "describe_names",
    "reference_count",
]
