"""Benchmarks stored in files: an index of the samples, which are read one at a time."""

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

_MAX_LISTED = 3  # classes or samples listed in a message

LOADERS = ("default", "released")
"""How references are drawn and masks are read; see `FileBenchmark`."""


@dataclass(frozen=True)
class FileItem:
    """A sample before its files are read.

    Attributes:
        sample_id: Unique within the benchmark and split.
        image: The target image.
        ground_truth: Its ground truth.
        prompt: The user prompt.
        level: See `ConceptSample`, also for `group`, `family`, `think`, `rule` and `answer`.
        dataset: Dataset of the sample, if the benchmark consists of several; the name of the benchmark by default.
        concept: The class from which references are drawn.
        references: References listed for the sample; if empty, references are drawn from the class.
    """

    sample_id: str
    image: Path
    ground_truth: GroundTruth
    prompt: str
    level: str
    group: str
    family: str
    dataset: str = ""
    concept: str = ""
    references: tuple[FileReference, ...] = ()
    think: str | None = None
    rule: str | None = None
    answer: str | None = None

    def read_fields(self) -> dict[str, Any]:
        """Return the fields of the sample that need no pixels."""
        names = ("sample_id", "prompt", "level", "group", "family", "think", "rule", "answer")
        return {name: getattr(self, name) for name in names}

    def read_image(self) -> tuple[Image.Image, int]:
        """Return the target image, RGB and upright, and the EXIF orientation that was applied."""
        return load_oriented_image(self.image)

    def read_header(self) -> tuple[Size, int]:
        """Return (width, height) of the upright target image and its EXIF orientation, if possible without decoding."""
        return read_header(self.image)


@dataclass(frozen=True)
class Index:
    """Samples of a split, as listed by a layout.

    Attributes:
        items: The samples of the split.
        pool: Pool from which references are drawn; None if references are listed for each sample, or there are none.
        files: Additional files that must exist, as pairs of kind and path.
        partial: Whether samples with missing files fail individually, like damaged ones. Otherwise missing files are an
            error for the whole set, because results without these samples would not be comparable.
    """

    items: Sequence[FileItem]
    pool: ReferencePool | None = None
    files: Sequence[tuple[str, Path]] = field(default_factory=tuple)
    partial: bool = False


@dataclass(frozen=True)
class LoadedReferences:
    """The references of an item after reading.

    Attributes:
        files: The files of the references.
        references: The references in the form that the processor accepts, one for each element of `files`.
        faults: Faults of references that cannot be used, each with the name of the file.
        lost: Number of these that could not be replaced.
    """

    files: list[FileReference]
    references: list[Reference]
    faults: tuple[str, ...]
    lost: int


@dataclass(frozen=True)
class LoadedGroundTruth:
    """Ground truth loaded for an image, as fields of a `ConceptSample`.

    Attributes:
        fitted: Fields at the size of the image.
        stored: Fields at the stored size.
        fault: Why the stored size does not match the image; None if it matches.
    """

    fitted: dict[str, Any]
    stored: dict[str, Any]
    fault: str | None = None


class FileBenchmark(Sequence[ConceptSample]):
    """Samples that are read from files on access and are not cached.

    References are drawn from the seed and the sample's id, so they do not depend on which samples are read or in which
    order. With the loader `"released"` they are drawn as in the released code, with replacement and from one random
    generator for all samples in order, and ground-truth masks keep their gray values (`soft_mask`).

    Args:
        name: Name of the benchmark.
        split: Split of the benchmark.
        index: The samples and the pool of references.
        root: Folder of the files, for messages.
        limit: Maximum number of samples.
        seed: Random seed of the references.
        loader: One of `LOADERS`.

    Attributes:
        items: The samples before reading.
        without_references: Classes from which references should be drawn but that have none.
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
        self._warned: set[tuple[str, bool]] = set()
        self._drawn = self._draw_in_order() if loader == "released" else None
        self.without_references = self._classes_without_references()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        """Read a sample.

        Raises:
            IndexError: If the index is out of range.
            UnreadableSampleError: If its image, ground truth or prompt cannot be read.
        """
        if isinstance(index, slice):
            raise TypeError(f"{self.name}: slices are not supported; use limit= or itertools.islice.")
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: index {index} is outside of 0..{len(self) - 1}.")
        item = self.items[index]
        fields: dict[str, Any] = {"sample_id": item.sample_id, "level": item.level, "group": item.group}
        fields |= {"family": item.family, "dataset": item.dataset or self.name, "split": self.split}
        try:
            fields |= item.read_fields()
            image, orientation = item.read_image()
        except (OSError, ValueError) as error:
            raise UnreadableSampleError(
                _describe_fault(item, error), fields, _ground_truth_or_none(item)
            ) from error
        try:
            ground_truth = read_ground_truth(item.ground_truth, image.size, orientation)
            soft_mask = item.ground_truth.read_soft() if self.loader == "released" else None
        except (
            OSError,
            ValueError,
        ) as error:  # without `size`, the mask is read without checking its orientation
            raise UnreadableSampleError(
                _describe_fault(item, error), fields, _ground_truth_or_none(item)
            ) from error
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
                _describe_fault(item, ground_truth.fault), fields, ground_truth.stored, sample
            )
        return sample

    def __iter__(self) -> Iterator[ConceptSample]:
        for index in range(len(self)):
            yield self[index]

    def references_of(self, item: FileItem) -> list[FileReference]:
        """Return the references of an item, listed or drawn, whether or not they can be used."""
        return self._draw(item)[0]

    def _draw(self, item: FileItem) -> tuple[list[FileReference], random.Random | None]:
        """Return the references of an item, and the random generator for drawing replacements."""
        if item.references or self._pool is None:
            return list(item.references), None
        # Strings are seeded through a hash that is the same in all processes and Python versions.
        rng = random.Random(f"{self.seed}/{self.name}/{self.split}/{item.sample_id}")
        if self._drawn is not None:
            return self._drawn[item.sample_id], rng
        return self._pool.draw(item.concept, rng, item.image), rng

    def _draw_in_order(self) -> dict[str, list[FileReference]]:
        """Draw references of all samples without listed ones from one random generator; return them by sample id."""
        if self._pool is None:
            return {}
        rng = random.Random(self.seed)
        items = [item for item in self.items if not item.references]
        classes = {
            concept: list(self._pool.references(concept))
            for concept in dict.fromkeys(item.concept for item in items)
        }
        return {
            item.sample_id: draw_with_replacement(classes[item.concept], rng, item.image) for item in items
        }

    def read_references(self, item: FileItem) -> LoadedReferences:
        """Read the references of an item, and replace unusable ones with other references of its class.

        The replacements depend only on the seed and the sample. A warning is issued once for each unusable reference.
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
        self._warn_about(found, item)
        return found

    def _read_reference(self, file: FileReference) -> Reference:
        """Read and check a reference; the result is cached if it consists of paths only."""
        if file not in self._tried:
            reference = file.read()
            if not isinstance(reference.image, Path) or isinstance(reference.mask, Image.Image):
                return reference
            self._tried[file] = reference
        return self._tried[file]

    def _warn_about(self, found: LoadedReferences, item: FileItem) -> None:
        for fault in found.faults:
            key = (fault, found.lost > 0)
            if key not in self._warned:
                self._warned.add(key)
                warnings.warn(
                    f"{self.name}: a reference cannot be used and is replaced by another one of its class: {fault}"
                    if found.lost == 0
                    else f"{self.name}: a reference cannot be used and no replacement is available, so sample "
                    f"{item.sample_id!r} has {found.lost} fewer: {fault}",
                    stacklevel=4,
                )

    def all_references(self) -> list[FileReference]:
        """Return all references that samples may have with any seed, without duplicates."""
        own = [reference for item in self.items for reference in item.references]
        if self._pool is None:
            return list(dict.fromkeys(own))
        concepts = dict.fromkeys(item.concept for item in self.items if not item.references)
        drawable = (reference for concept in concepts for reference in self._pool.references(concept))
        return list(dict.fromkeys([*own, *drawable]))

    def files(self) -> Iterator[tuple[str, Path]]:
        """Iterate over all files that the samples need, as pairs of kind and path."""
        yield from self._files
        for item in self.items:
            yield from self._files_of(item)

    def _files_of(self, item: FileItem) -> Iterator[tuple[str, Path]]:
        yield "image", item.image
        yield from (("mask", path) for path in item.ground_truth.files)
        draws_without_reading = self._pool is None or not self._pool.reads_files
        for reference in self.references_of(item) if draws_without_reading else item.references:
            yield "reference image", reference.image
            if reference.ground_truth is not None:
                yield from (("reference mask", path) for path in reference.ground_truth.files)

    def check(self) -> None:
        """Check that samples and files exist; warn about missing files of samples and classes without references.

        Raises:
            ValueError: If there are no samples.
            MissingFilesError: If files are missing (for a partial index: if no sample has all of its files); the error
                counts and lists all of them.
        """
        self.check_length()
        if self._partial:
            self._warn_about_missing_files()
        else:
            check_files(self.files(), self.name, self.root)
        if self.without_references:
            count = sum(item.concept in self.without_references for item in self.items)
            warnings.warn(
                f"{self.name}: {describe_names(self.without_references)} no reference image in the train split "
                f"besides the target; {count} of {len(self)} samples have no references.",
                stacklevel=3,
            )

    def check_length(self) -> None:
        """Check that there are samples.

        Raises:
            ValueError: If there are none.
        """
        if not self.items:
            raise ValueError(
                f"load_benchmark: {self.name!r} has no samples in split {self.split!r} below {str(self.root)!r}; "
                "give another split, or another root."
            )

    def _warn_about_missing_files(self) -> None:
        own = {item.sample_id: (item.image, *item.ground_truth.files) for item in self.items}
        lacking = [name for name, paths in own.items() if not all(map(is_file, paths))]
        if len(lacking) == len(self):
            check_files(self.files(), self.name, self.root)
        elif lacking:
            warnings.warn(
                f"{self.name}: {len(lacking)} of {len(self)} samples lack files ({_join_names(lacking)}) and will "
                "fail; `conceptseg data check` lists the files.",
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
    """Return a subject with its verb: "class 'a' has", or "4 classes ('a', 'b', 'c', ...) have"."""
    if len(names) == 1:
        return f"class {names[0]!r} has"
    return f"{len(names)} classes ({_join_names(names)}) have"


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_MAX_LISTED])) + (", ..." if len(names) > _MAX_LISTED else "")


def read_ground_truth(ground_truth: GroundTruth, size: Size, orientation: int = 1) -> LoadedGroundTruth:
    """Read ground truth, and resize it (nearest neighbor) if its size differs from that of the image.

    Args:
        ground_truth: The ground truth.
        size: (width, height) of the image.
        orientation: EXIF orientation of the image.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    mask, ignore = ground_truth.read(size, orientation)
    stored_size = mask.shape[::-1]
    stored = _ground_truth_fields(ground_truth, mask, ignore)
    if stored_size == size:
        return LoadedGroundTruth(stored, stored)
    fitted = _ground_truth_fields(
        ground_truth, resize(mask, size), None if ignore is None else resize(ignore, size)
    )
    fitted["stored_mask"] = stored["mask"]
    fault = (
        None
        if is_similar_size(stored_size, size)
        else describe_size_mismatch(ground_truth.name, stored_size, size)
    )
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


def _describe_fault(item: FileItem, error: Exception | str) -> str:
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
