"""Importers: any benchmark of the registry as a flat dataset.

Every target and every reference image is one sample. A target lists its references in `reference_ids`; a reference
image that serves many targets is there once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiftyone as fo
from fiftyone import ViewField as F
from PIL import Image

from ...data import ConceptSample, FileBenchmark, UnreadableSampleError, load_benchmark
from ...images import load_image, load_mask, mask_to_image
from ...references import Reference, mask_to_box
from .files import default_folder, write_picture
from .labels import relative_box
from .schema import (
    GROUND_TRUTH,
    IGNORE,
    REFERENCE,
    REFERENCE_BOXES,
    REFERENCE_IDS,
    TARGET,
    declare_benchmark_fields,
)

_STEP = 20  # samples between two reports of progress


def load_concept_benchmark(
    name: str = "concept-shapes",
    root: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    dataset_name: str | None = None,
    seed: int = 42,
    progress: Callable[[int, int], None] | None = None,
) -> fo.Dataset:
    """Loads a benchmark into FiftyOne; samples that are there already stay as they are.

    Pictures of files stay where they are; drawn ones and all masks are written to FiftyOne's folder for data. A sample
    that cannot be read becomes a sample with `load_error`, which the next load tries again.

    Args:
        name: One of `conceptseg_hf.data.BENCHMARKS`.
        root: Folder of its files; None for `"concept-shapes"`.
        split: Its split.
        limit: Only the first samples.
        dataset_name: The dataset, made if it is not there; by default `<name>-<split>`.
        seed: Seed by which references are drawn.
        progress: Called with (done, total) as samples come in.

    Returns:
        The dataset, with the saved views "targets", "references", one per level, and "episodes" (target and own
        references as dynamic groups).

    Raises:
        ValueError: If there is no such benchmark or split.
        MissingFilesError: If files are missing.
    """
    dataset_name = dataset_name or f"{name}-{split}"
    for done, total in import_benchmark(name, root, split, limit, dataset_name, seed):
        if progress is not None:
            progress(done, total)
    return fo.load_dataset(dataset_name)


def import_benchmark(
    name: str, root: str | Path | None, split: str, limit: int | None, dataset_name: str, seed: int = 42
) -> Iterator[tuple[int, int]]:
    """As `load_concept_benchmark`, step by step: yields (done, total) at the start and after every few samples."""
    samples = load_benchmark(name, root=root, split=split, limit=limit, seed=seed)
    if fo.dataset_exists(dataset_name):
        dataset = fo.load_dataset(dataset_name)
        if len(dataset) and not dataset.has_field("benchmark"):
            raise ValueError(
                f"dataset {dataset_name!r} is there already and holds other samples; give another name."
            )
    else:
        dataset = fo.Dataset(dataset_name, persistent=True)
    declare_benchmark_fields(dataset)
    writer = _Writer(dataset, name, split)
    own = dataset.match((F("benchmark") == name) & (F("split") == split) & (F("role") == TARGET))
    dataset.delete_samples(own.match(F("load_error") != None))  # noqa: E711 (an expression of FiftyOne)
    present = set(own.values("episode"))
    total = len(samples)
    yield 0, total
    for done, (index, sample) in enumerate(_read(samples), start=1):
        episode = _id_of(sample, index)
        if episode not in present:
            writer.add(samples, index, sample, episode)
        if done % _STEP == 0 or done == total:
            yield done, total
    _save_views(dataset)


class _Writer:
    """Stores targets, each right after the references that it is the first to use."""

    def __init__(self, dataset: fo.Dataset, name: str, split: str) -> None:
        self._dataset, self._name, self._split = dataset, name, split
        self._folder = default_folder(dataset.name, name, split)
        shared = dataset.match((F("role") == REFERENCE) & (F("episode") == None))  # noqa: E711
        self._shared = dict(zip(shared.values("filepath"), shared.values("id")))

    def add(
        self, samples: Any, index: int, sample: ConceptSample | UnreadableSampleError, episode: str
    ) -> None:
        """Adds a target and its references."""
        item = samples.items[index] if isinstance(samples, FileBenchmark) else None
        if isinstance(sample, UnreadableSampleError):
            if item is not None:
                self._dataset.add_sample(self._failed(sample, item.image, episode))
            return
        path = str(item.image) if item is not None else self._write(sample.image, "images", episode)
        fields = {name: getattr(sample, name) for name in ("prompt", "level", "group", "family")}
        target = fo.Sample(
            filepath=path,
            role=TARGET,
            benchmark=self._name,
            split=self._split,
            episode=episode,
            present=sample.present,
            true_rule=sample.rule,
            true_answer=sample.answer,
            **fields,
        )
        target.metadata = fo.ImageMetadata(width=sample.image.width, height=sample.image.height)
        if not sample.box_only:
            target[GROUND_TRUTH] = fo.Segmentation(mask_path=self._write(sample.mask, "masks", episode))
        if sample.ignore is not None:
            target[IGNORE] = fo.Segmentation(mask_path=self._write(sample.ignore, "ignore", episode))
        files = [reference.image for reference in samples.references_of(item)] if item is not None else None
        target[REFERENCE_IDS] = [
            self._reference_id(
                reference, None if files is None else str(files[number]), f"{episode}-{number}", target
            )
            for number, reference in enumerate(sample.references)
        ]
        self._dataset.add_sample(target)

    def _write(self, image: Image.Image, kind: str, stem: str) -> str:
        return write_picture(image, self._folder / kind, stem.replace("/", "_"))

    def _reference_id(self, reference: Reference, path: str | None, stem: str, target: fo.Sample) -> str:
        if path in self._shared:
            return self._shared[path]
        own = path is None
        image = load_image(reference.image)
        sample = fo.Sample(
            filepath=self._write(image, "references", stem) if own else path,
            role=REFERENCE,
            benchmark=self._name,
            split=self._split,
            episode=target["episode"] if own else None,
            level=target["level"],
            group=target["group"],
            prompt=target["prompt"] if own else None,
        )
        sample.metadata = fo.ImageMetadata(width=image.width, height=image.height)
        box = reference.box
        if box is None and reference.mask is not None:
            mask = load_mask(reference.mask, image.size)
            sample[GROUND_TRUTH] = fo.Segmentation(mask_path=self._write(mask_to_image(mask), "masks", stem))
            box = mask_to_box(mask)
        if box is not None:
            sample[REFERENCE_BOXES] = fo.Detections(
                detections=[fo.Detection(label="reference", bounding_box=relative_box(box, image.size))]
            )
        self._dataset.add_sample(sample)
        if not own:
            self._shared[path] = sample.id
        return sample.id

    def _failed(self, error: UnreadableSampleError, path: Path, episode: str) -> fo.Sample:
        fields = {name: error.fields[name] for name in ("prompt", "level", "group", "family")}
        return fo.Sample(
            filepath=str(path),
            role=TARGET,
            benchmark=self._name,
            split=self._split,
            episode=episode,
            load_error=str(error),
            **fields,
        )


def _read(samples: Any) -> Iterator[tuple[int, ConceptSample | UnreadableSampleError]]:
    for index in range(len(samples)):
        try:
            yield index, samples[index]
        except UnreadableSampleError as error:
            yield index, error


def _id_of(sample: ConceptSample | UnreadableSampleError, index: int) -> str:
    if isinstance(sample, UnreadableSampleError):
        return str(sample.fields.get("sample_id", index))
    return sample.sample_id


def _save_views(dataset: fo.Dataset) -> None:
    targets = dataset.match(F("role") == TARGET)
    views = {"targets": targets, "references": dataset.match(F("role") == REFERENCE)}
    views |= {
        f"level {level}": targets.match(F("level") == level) for level in sorted(targets.distinct("level"))
    }
    views["episodes"] = dataset.match(F("episode") != None).group_by(  # noqa: E711
        "episode", order_by="role", reverse=True
    )
    for name, view in views.items():
        dataset.save_view(name, view, overwrite=True)
