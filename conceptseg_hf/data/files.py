"""Benchmarks that lie in files: an index of what there is, and samples that are read one by one."""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import load_image, mask_to_image
from ..references import Reference, mask_to_box
from .paths import check_files
from .sample import ConceptSample, UnreadableSampleError
from .truths import BoxTruth, MaskFile, PixelBox, Truth

_NAMED = 3  # classes or samples that a message names


@dataclass(frozen=True)
class FileReference:
    """A reference image, with its truth where there is one."""

    image: Path
    truth: Truth | None = None

    def read(self) -> Reference:
        """As the processor takes it; files that it can open itself stay paths."""
        if self.truth is None:
            return Reference(self.image)
        if isinstance(self.truth, MaskFile):
            return Reference(self.image, mask=self.truth.path)
        image = load_image(self.image)
        if isinstance(self.truth, (BoxTruth, PixelBox)):
            return Reference(image, box=self.truth.box(image.size))
        mask, _ = self.truth.read(image.size)
        return Reference(image, box=mask_to_box(mask))


@dataclass(frozen=True)
class FileItem:
    """What is known of a sample before anything is read.

    Attributes:
        sample_id: Unique within the benchmark and split.
        image: The target image.
        truth: Its truth.
        prompt: The words.
        level: See `ConceptSample`, as `group`, `family`, `think`, `rule` and `answer`.
        concept: The class whose other images can serve as references.
        references: References of its own; without them they are drawn from the class.
    """

    sample_id: str
    image: Path
    truth: Truth
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

    def read_image(self) -> Image.Image:
        """The target image, RGB."""
        return load_image(self.image)


class ReferencePool(ABC):
    """Images of which references are drawn."""

    reads_files = False
    """Whether drawing opens files."""

    @abstractmethod
    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """Draws references of a class without replacement: 1 if the class has 2 images, else 4 or all there are.

        Args:
            concept: The class.
            rng: Source of chance.
            exclude: The target, which is never its own reference.
        """

    def knows(self, concept: str, exclude: Path) -> bool:
        """Whether there is at least one reference; cheap, and True where only reading could tell."""
        return True


def reference_count(class_size: int) -> int:
    """How many references a class of this size gives (as the paper's data loader): 1 of 2 images, else 4."""
    return 1 if class_size == 2 else 4


class ClassPool(ReferencePool):
    """References by class, all known beforehand.

    Args:
        references: The references of each class.
    """

    def __init__(self, references: Mapping[str, Sequence[FileReference]]) -> None:
        self._references = references
        self._copies = {
            concept: Counter(reference.image for reference in everything)
            for concept, everything in references.items()
        }

    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """See `ReferencePool.draw`."""
        everything = self._references.get(concept, ())
        count = reference_count(len(everything))
        # As many more as could be the target itself: the rest is then a fair draw among the others.
        copies = self._copies[concept][exclude] if everything else 0
        drawn = rng.sample(everything, min(count + copies, len(everything)))
        return [reference for reference in drawn if reference.image != exclude][:count]

    def knows(self, concept: str, exclude: Path) -> bool:
        """See `ReferencePool.knows`."""
        everything = self._references.get(concept, ())
        return bool(everything) and len(everything) > self._copies[concept][exclude]


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


class FileBenchmark(Sequence[ConceptSample]):
    """Samples that are read from files when they are asked for; nothing is kept.

    References are drawn from a seed and the sample's id: the same sample has the same references whatever else is read,
    in whatever order.

    Args:
        name: Name of the benchmark.
        split: Its split.
        index: What there is.
        root: The folder of the files, for messages.
        limit: Only the first samples.
        seed: Seed of the references.

    Attributes:
        items: What is known of the samples without reading them.
        without_references: The classes whose samples should have references and can have none.
    """

    def __init__(
        self, name: str, split: str, index: Index, root: Path, limit: int | None = None, seed: int = 42
    ) -> None:
        self.name, self.split, self.root, self.seed = name, split, root, seed
        self.items = index.items if limit is None else index.items[:limit]
        self._pool, self._files, self._partial = index.pool, index.files, index.partial
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
            image = item.read_image()
        except (OSError, ValueError) as error:
            raise UnreadableSampleError(_because(item, error), fields, _truth_or_none(item)) from error
        try:
            truth = _read_truth(item.truth, image.size)
        except (OSError, ValueError) as error:
            raise UnreadableSampleError(_because(item, error), fields) from error
        try:
            references = [reference.read() for reference in self.references_of(item)]
        except (OSError, ValueError) as error:
            raise UnreadableSampleError(_because(item, error), fields, truth) from error
        return ConceptSample(image=image, references=references, **fields, **truth)

    def __iter__(self) -> Iterator[ConceptSample]:
        for index in range(len(self)):
            yield self[index]

    def references_of(self, item: FileItem) -> list[FileReference]:
        """The references of an item: its own, or those that the seed draws."""
        if item.references or self._pool is None:
            return list(item.references)
        # A text seeds through a hash that is the same in every process and release.
        rng = random.Random(f"{self.seed}/{self.name}/{self.split}/{item.sample_id}")
        return self._pool.draw(item.concept, rng, item.image)

    def files(self) -> Iterator[tuple[str, Path]]:
        """All files that the samples need, as pairs of kind and path."""
        yield from self._files
        for item in self.items:
            yield from self._files_of(item)

    def _files_of(self, item: FileItem) -> Iterator[tuple[str, Path]]:
        yield "image", item.image
        yield from (("mask", path) for path in item.truth.files)
        draws_freely = self._pool is None or not self._pool.reads_files
        for reference in self.references_of(item) if draws_freely else item.references:
            yield "reference image", reference.image
            if reference.truth is not None:
                yield from (("reference mask", path) for path in reference.truth.files)

    def check(self) -> None:
        """Checks that files are there, and warns of samples that lack some and of classes that have no references.

        Raises:
            MissingFilesError: If files are missing (where samples may lack some: if no sample has all of its own); it
                counts and holds all of them.
        """
        lacking = self._samples_lacking_files() if self._partial else []
        if not self._partial or len(lacking) == len(self):
            check_files(self.files(), self.name, self.root)
        elif lacking:
            warnings.warn(
                f"{self.name}: {len(lacking)} of {len(self)} samples lack files ({_shown(lacking)}) and will fail; "
                "conceptseg data check names the files.",
                stacklevel=3,
            )
        if self.without_references:
            count = sum(item.concept in self.without_references for item in self.items)
            warnings.warn(
                f"{self.name}: {describe_names(self.without_references)} no reference image in the train split "
                f"besides the target; {count} of {len(self)} samples come without references.",
                stacklevel=3,
            )

    def _samples_lacking_files(self) -> list[str]:
        return [
            item.sample_id
            for item in self.items
            if not all(path.is_file() for _, path in self._files_of(item))
        ]

    def _classes_without_references(self) -> tuple[str, ...]:
        if self._pool is None:
            return ()
        missing = (
            item.concept
            for item in self.items
            if not item.references and not self._pool.knows(item.concept, item.image)
        )
        return tuple(dict.fromkeys(missing))


def describe_names(names: Sequence[str]) -> str:
    """Subject and verb: "class 'a' has", or "4 classes ('a', 'b', 'c', ...) have"."""
    if len(names) == 1:
        return f"class {names[0]!r} has"
    return f"{len(names)} classes ({_shown(names)}) have"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def _read_truth(truth: Truth, size: tuple[int, int] | None) -> dict[str, Any]:
    mask, ignore = truth.read(size)
    return {
        "mask": mask_to_image(mask),
        "box": truth.box(size) if isinstance(truth, BoxTruth) else mask_to_box(mask),
        "ignore": None if ignore is None else mask_to_image(ignore),
        "box_only": truth.box_only,
    }


def _truth_or_none(item: FileItem) -> dict[str, Any] | None:
    try:
        return _read_truth(item.truth, None)
    except (OSError, ValueError):
        return None


def _because(item: FileItem, error: Exception) -> str:
    return f"sample {item.sample_id!r}: {error}"
