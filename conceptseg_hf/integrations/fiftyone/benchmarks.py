"""Import any registered benchmark as a flat FiftyOne dataset.

Each target image and each reference image is one sample. A target lists its references in `reference_ids`. A reference
image that several targets use with the same mark is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import fiftyone as fo
import fiftyone.core.media as fomm
import fiftyone.core.storage as fos
import fiftyone.core.utils as fou
from fiftyone import ViewField as F
from PIL import Image

from ...boxes import mask_to_box
from ...data import ConceptSample, FileBenchmark, UnreadableSampleError, load_benchmark
from ...data.files import FileReference
from ...images import load_image, load_mask, mask_to_image
from ...references import Reference
from .field_locks import Lock, locked
from .files import default_folder, write_image
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

_SOURCES = "conceptseg_benchmarks"  # key of `dataset.info`: benchmark, split and folder of each load
_PROGRESS_INTERVAL = 20  # number of samples between two progress reports
LOADING = "(samples)"
"""Name of the lock that a load acquires; without it, two concurrent loads would add each sample twice."""

Mark: TypeAlias = tuple[str | None, tuple[tuple[float, ...], ...]]
"""The mark of the concept in a reference: the path of the mask file (or None) and the relative boxes (may be empty)."""


def load_concept_benchmark(
    name: str = "concept-shapes",
    root: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    dataset_name: str | None = None,
    seed: int = 42,
    progress: Callable[[int, int], object] | None = None,
) -> fo.Dataset:
    """Load a benchmark into a FiftyOne dataset; samples and saved views that already exist are left unchanged.

    Image files are referenced in place. Generated images, all masks, and PNG copies of images with a file extension
    that FiftyOne does not recognize are written to FiftyOne's default dataset directory. A sample that cannot be read,
    for example because its image is missing, is added with a `load_error`; the next load retries it.

    Args:
        name: One of `conceptseg_hf.data.BENCHMARKS`.
        root: Folder of the benchmark's files; None for `"concept-shapes"`.
        split: Split to load.
        limit: Maximum number of samples; None loads all.
        dataset_name: Name of the dataset, which is created if it does not exist; `<name>-<split>` by default. A dataset
            may hold several benchmarks and splits, each loaded from a single folder.
        seed: Random seed for sampling the references.
        progress: Callback that is called with (done, total) while samples are loaded.

    Returns:
        The dataset, with the saved views "targets", "references", one per level, and "episodes" (a dynamic group of
        each target and its own references).

    Raises:
        ValueError: If the benchmark or split does not exist, the dataset holds other samples, or another load into it
            is in progress.
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
    """Generator version of `load_concept_benchmark`: yields (done, total) at the start and after every few samples.

    The generator ends early if `field_locks.request_cancel(dataset, LOADING)` is called.
    """
    samples = load_benchmark(name, root=root, split=split, limit=limit, seed=seed)
    if fo.dataset_exists(dataset_name):
        dataset = fo.load_dataset(dataset_name)
    else:
        dataset = fo.Dataset(dataset_name, persistent=True)
    source = None if root is None else str(Path(root).expanduser().resolve())
    with locked(dataset, [LOADING], f"dataset {dataset_name!r}", total=len(samples)) as lock:
        _remember_source(dataset, name, split, source)
        yield from _add_samples(dataset, samples, name, split, lock)
        _save_views(dataset)


def _add_samples(
    dataset: fo.Dataset, samples: Any, name: str, split: str, lock: Lock
) -> Iterator[tuple[int, int]]:
    declare_benchmark_fields(dataset)
    writer = _Writer(dataset, name, split)
    own = dataset.match((F("benchmark") == name) & (F("split") == split) & (F("role") == TARGET))
    dataset.delete_samples(own.match(F("load_error") != None))  # noqa: E711 (FiftyOne expression)
    present = set(own.values("episode"))
    total = len(samples)
    yield 0, total
    for done, (index, sample) in enumerate(_read(samples), start=1):
        episode = _id_of(sample, index)
        if episode not in present:
            writer.add(samples, index, sample, episode)
        if done % _PROGRESS_INTERVAL == 0 or done == total:
            cancelled = lock.beat(done)
            yield done, total
            if cancelled:
                return


def _remember_source(dataset: fo.Dataset, name: str, split: str, root: str | None) -> None:
    """Record the source of the samples before the first one is added, so that an interrupted load can be resumed."""
    known = dataset.info.get(_SOURCES) if len(dataset) else []
    if known is None:
        raise ValueError(
            f"dataset {dataset.name!r} already exists and holds other samples; use another dataset_name."
        )
    for source in known:
        if (source["benchmark"], source["split"]) == (name, split) and source["root"] != root:
            raise ValueError(
                f"dataset {dataset.name!r} holds {name!r} from {source['root']!r}, and samples from {root!r} may have "
                "the same ids; use another dataset_name."
            )
    source = {"benchmark": name, "split": split, "root": root}
    if source not in known:
        dataset.info[_SOURCES] = [*known, source]
        dataset.save()


class _Writer:
    """Adds targets to the dataset; the references that a target is the first to use are added right before it."""

    def __init__(self, dataset: fo.Dataset, name: str, split: str) -> None:
        self._dataset, self._name, self._split = dataset, name, split
        self._folder = default_folder(dataset.name, name, split)
        self._shared = _shared_references(dataset)
        self._by_file: dict[FileReference, str] = {}  # cache: each reference file is read only once

    def add(
        self, samples: Any, index: int, sample: ConceptSample | UnreadableSampleError, episode: str
    ) -> None:
        """Add a target and its references."""
        item = samples.items[index] if isinstance(samples, FileBenchmark) else None
        if isinstance(sample, UnreadableSampleError):
            if item is not None:
                self._add_failed(sample, item.image, episode, sample.fields)
            return
        path = self._path_of(item.image if item is not None else None, sample.image, "images", episode)
        fields = {name: getattr(sample, name) for name in ("prompt", "level", "group", "family")}
        target = fo.Sample(
            filepath=path,
            role=TARGET,
            benchmark=self._name,
            split=self._split,
            episode=episode,
            present=sample.present,
            gt_rule=sample.rule,
            gt_answer=sample.answer,
            **fields,
        )
        target.metadata = fo.ImageMetadata(width=sample.image.width, height=sample.image.height)
        if not sample.box_only:
            target[GROUND_TRUTH] = fo.Segmentation(mask_path=self._write(sample.mask, "masks", episode))
        if sample.ignore is not None:
            target[IGNORE] = fo.Segmentation(mask_path=self._write(sample.ignore, "ignore", episode))
        if item is None:
            target[REFERENCE_IDS] = [
                self._drawn_reference(reference, f"{episode}-{number}", target)
                for number, reference in enumerate(sample.references)
            ]
        else:
            try:
                loaded = samples.read_references(item)  # the sample's references with their files
                target[REFERENCE_IDS] = [
                    self._shared_reference(file, reference, target)
                    for file, reference in zip(loaded.files, loaded.references, strict=True)
                ]
            except (ValueError, OSError) as error:  # a file has changed since it was listed
                self._add_failed(error, item.image, episode, fields)
                return
        self._dataset.add_sample(target)

    def _path_of(self, path: Path | None, image: Image.Image, kind: str, stem: str) -> str:
        """Return `path` if FiftyOne recognizes it as an image; otherwise, write the image and return the new path."""
        return str(path) if path is not None and _is_image(path) else self._write(image, kind, stem)

    def _write(self, image: Image.Image, kind: str, stem: str) -> str:
        return write_image(image, self._folder / kind, stem.replace("/", "_"))

    def _shared_reference(self, file: FileReference, reference: Reference, target: fo.Sample) -> str:
        """Return the id of a reference from a file; add it unless the same image with the same mark exists."""
        if file not in self._by_file:
            image, stem = load_image(reference.image), file.image.stem
            path = fos.normalize_path(self._path_of(file.image, image, "references", stem))
            mark = self._mark_of(reference, image.size, stem)
            if (path, mark) not in self._shared:
                self._shared[path, mark] = self._add_reference(path, image.size, mark, target)
            self._by_file[file] = self._shared[path, mark]
        return self._by_file[file]

    def _drawn_reference(self, reference: Reference, stem: str, target: fo.Sample) -> str:
        """Add a generated reference that belongs to a single target, and write its image."""
        image = load_image(reference.image)
        path, mark = self._write(image, "references", stem), self._mark_of(reference, image.size, stem)
        return self._add_reference(
            path, image.size, mark, target, episode=target["episode"], prompt=target["prompt"]
        )

    def _mark_of(self, reference: Reference, size: tuple[int, int], stem: str) -> Mark:
        boxes: Sequence[Sequence[float] | None] | None
        boxes = reference.boxes if reference.box is None else [reference.box]
        mask_path = None
        if boxes is None and reference.mask is not None:
            mask = load_mask(reference.mask, size)
            mask_path, boxes = self._write(mask_to_image(mask), "reference_masks", stem), [mask_to_box(mask)]
        return mask_path, tuple(tuple(relative_box(box, size)) for box in boxes or () if box is not None)

    def _add_reference(
        self, path: str, size: tuple[int, int], mark: Mark, target: fo.Sample, **fields: str
    ) -> str:
        sample = fo.Sample(
            filepath=path,
            role=REFERENCE,
            benchmark=self._name,
            split=self._split,
            level=target["level"],
            group=target["group"],
            **fields,
        )
        sample.metadata = fo.ImageMetadata(width=size[0], height=size[1])
        mask_path, boxes = mark
        if mask_path is not None:
            sample[GROUND_TRUTH] = fo.Segmentation(mask_path=mask_path)
        if boxes:
            sample[REFERENCE_BOXES] = fo.Detections(
                detections=[fo.Detection(label="reference", bounding_box=list(box)) for box in boxes]
            )
        self._dataset.add_sample(sample)
        return sample.id

    def _add_failed(self, error: Exception, path: Path, episode: str, fields: Mapping[str, Any]) -> None:
        shown = (
            path if _is_image(path) else path.with_suffix(".png")
        )  # `path` may be a pattern such as "photo.*"
        self._dataset.add_sample(
            fo.Sample(
                filepath=str(shown),
                role=TARGET,
                benchmark=self._name,
                split=self._split,
                episode=episode,
                load_error=str(error),
                **{name: fields[name] for name in ("prompt", "level", "group", "family")},
            )
        )


def _shared_references(dataset: fo.Dataset) -> dict[tuple[str, Mark], str]:
    """Return the ids of the references that are not tied to a single target, by image path and mark.

    The name of a mask file identifies its content, so a mark is equal across loads.
    """
    shared = dataset.match((F("role") == REFERENCE) & (F("episode") == None))  # noqa: E711
    stored = zip(
        shared.values("filepath"),
        shared.values(f"{GROUND_TRUTH}.mask_path"),
        shared.values(f"{REFERENCE_BOXES}.detections.bounding_box"),
        shared.values("id"),
    )
    return {(path, (mask, tuple(map(tuple, boxes or ())))): id_ for path, mask, boxes, id_ in stored}


def _is_image(path: Path) -> bool:
    """Whether FiftyOne recognizes a file name as an image; image datasets reject samples of other media types."""
    return fomm.get_media_type(str(path)) == fomm.IMAGE


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
        # FiftyOne treats names with the same slug as equal. Existing views are kept, as the user may have edited them.
        if fou.to_slug(name) not in map(fou.to_slug, dataset.list_saved_views()):
            dataset.save_view(name, view)
