"""Importers: any benchmark of the registry as a flat dataset.

Every target and every reference image is one sample. A target lists its references in `reference_ids`; a reference
image that serves many targets with the same mark is there once.
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
_STEP = 20  # samples between two reports of progress
LOADING = "(samples)"
"""What a load holds, beside the fields that runs hold: two at once would add samples twice."""

Mark: TypeAlias = tuple[str | None, tuple[tuple[float, ...], ...]]
"""What marks the concept on a reference: the file of its mask and its relative boxes, as far as there are."""


def load_concept_benchmark(
    name: str = "concept-shapes",
    root: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    dataset_name: str | None = None,
    seed: int = 42,
    progress: Callable[[int, int], object] | None = None,
) -> fo.Dataset:
    """Loads a benchmark into FiftyOne; samples that are there already stay as they are.

    Pictures of files stay where they are; drawn ones, all masks, and copies (PNG) of pictures whose names FiftyOne does
    not take for images are written to its folder for data. A sample that cannot be read, a mask without its photo among
    them, becomes a sample with `load_error`, which the next load tries again. Saved views that are there stay as they
    are, too.

    Args:
        name: One of `conceptseg_hf.data.BENCHMARKS`.
        root: Folder of its files; None for `"concept-shapes"`.
        split: Its split.
        limit: Only the first samples.
        dataset_name: The dataset, made if it is not there; by default `<name>-<split>`. It may hold several benchmarks
            and splits, each from one folder.
        seed: Seed by which references are drawn.
        progress: Called with (done, total) as samples come in.

    Returns:
        The dataset, with the saved views "targets", "references", one per level, and "episodes" (target and own
        references as dynamic groups).

    Raises:
        ValueError: If there is no such benchmark or split, the dataset holds other samples, or another load into it is
            running.
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
    """As `load_concept_benchmark`, step by step: yields (done, total) at the start and after every few samples.

    It ends early if it is cancelled: `field_locks.request_cancel(dataset, LOADING)`.
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
    dataset.delete_samples(own.match(F("load_error") != None))  # noqa: E711 (an expression of FiftyOne)
    present = set(own.values("episode"))
    total = len(samples)
    yield 0, total
    for done, (index, sample) in enumerate(_read(samples), start=1):
        episode = _id_of(sample, index)
        if episode not in present:
            writer.add(samples, index, sample, episode)
        if done % _STEP == 0 or done == total:
            cancelled = lock.beat(done)
            yield done, total
            if cancelled:
                return


def _remember_source(dataset: fo.Dataset, name: str, split: str, root: str | None) -> None:
    """Notes where samples come from, before the first is there: a load that was cut off can then go on."""
    known = dataset.info.get(_SOURCES) if len(dataset) else []
    if known is None:
        raise ValueError(
            f"dataset {dataset.name!r} is there already and holds other samples; give another dataset_name."
        )
    for source in known:
        if (source["benchmark"], source["split"]) == (name, split) and source["root"] != root:
            raise ValueError(
                f"dataset {dataset.name!r} holds {name!r} from {source['root']!r}, and samples from {root!r} may have "
                "the same ids; give another dataset_name."
            )
    source = {"benchmark": name, "split": split, "root": root}
    if source not in known:
        dataset.info[_SOURCES] = [*known, source]
        dataset.save()


class _Writer:
    """Stores targets, each right after the references that it is the first to use."""

    def __init__(self, dataset: fo.Dataset, name: str, split: str) -> None:
        self._dataset, self._name, self._split = dataset, name, split
        self._folder = default_folder(dataset.name, name, split)
        self._shared = _shared_references(dataset)
        self._by_file: dict[FileReference, str] = {}  # spares reading a picture again for each target

    def add(
        self, samples: Any, index: int, sample: ConceptSample | UnreadableSampleError, episode: str
    ) -> None:
        """Adds a target and its references."""
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
                found = samples.read_references(item)  # those of the sample, with their files
                target[REFERENCE_IDS] = [
                    self._shared_reference(file, reference, target)
                    for file, reference in zip(found.files, found.references, strict=True)
                ]
            except (ValueError, OSError) as error:  # a file that has changed meanwhile
                self._add_failed(error, item.image, episode, fields)
                return
        self._dataset.add_sample(target)

    def _path_of(self, path: Path | None, image: Image.Image, kind: str, stem: str) -> str:
        """The file of a picture: its own, or one that is written if it has none that FiftyOne takes for an image."""
        return str(path) if path is not None and _is_image(path) else self._write(image, kind, stem)

    def _write(self, image: Image.Image, kind: str, stem: str) -> str:
        return write_image(image, self._folder / kind, stem.replace("/", "_"))

    def _shared_reference(self, file: FileReference, reference: Reference, target: fo.Sample) -> str:
        """The id of a file's reference, added unless its picture is there with the same mark."""
        if file not in self._by_file:
            image, stem = load_image(reference.image), file.image.stem
            path = fos.normalize_path(self._path_of(file.image, image, "references", stem))
            mark = self._mark_of(reference, image.size, stem)
            if (path, mark) not in self._shared:
                self._shared[path, mark] = self._add_reference(path, image.size, mark, target)
            self._by_file[file] = self._shared[path, mark]
        return self._by_file[file]

    def _drawn_reference(self, reference: Reference, stem: str, target: fo.Sample) -> str:
        """Adds a reference that is the target's own, and its picture."""
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
        shown = path if _is_image(path) else path.with_suffix(".png")  # one of no name, such as "photo.*"
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
    """The ids of the references that no target has for itself, by picture and mark.

    The name of a mask's file stands for its content, so a mark is the same in every load.
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
    """Whether FiftyOne takes a file for an image, which it tells by its name; it refuses others beside images."""
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
        # FiftyOne takes names with the same slug for one. A view that is there may be edited: it stays.
        if fou.to_slug(name) not in map(fou.to_slug, dataset.list_saved_views()):
            dataset.save_view(name, view)
