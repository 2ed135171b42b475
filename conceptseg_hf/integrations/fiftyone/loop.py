"""Segmentation loop of the plugin's operator: read and segment a batch, write the mask files, then save the labels.

A mask file is written before the label that refers to it, and labels are saved after each batch. A killed run therefore
loses only the current batch, and `skip_existing` resumes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import fiftyone as fo
from bson import ObjectId
from fiftyone import ViewField as F

from ...outputs import ConceptSegmentation
from ...pipelines import ConceptSegmentationPipeline
from ...references import Reference
from .checkpoints import check_pipeline, get_pipeline, segment_batch
from .field_locks import Holder, Lock, check_free, interrupted_run, locked, request_cancel
from .files import default_folder
from .job import SegmentationJob
from .labels import attributes_of, to_labels
from .progress import Progress
from .reference_samples import references_from, samples_by_id
from .runs import catch_up, check_output_fields, name_masks, stale_fields, writable_fields
from .schema import declare_prediction_fields, output_fields, whole_dataset

_DECLARATION_LOCK = threading.Lock()


def segment_collection(
    samples: fo.core.collections.SampleCollection,
    job: SegmentationJob,
    pipeline: ConceptSegmentationPipeline | None = None,
) -> Iterator[Progress]:
    """Segment samples; yield the progress at the start and after each batch.

    Only one run at a time can write to a field. If a run is killed, cancelled (`cancel_segmentation`) or not iterated
    to the end, the predictions made so far are kept, and the same job resumes the run.

    Args:
        samples: Dataset or view of images. Samples that cannot be segmented get a label with `error` and an empty mask;
            the job's reference samples are skipped.
        job: Settings of the run. They are stored as a custom run, and each label has the run's key in `run`.
        pipeline: Pipeline to use; that of `job.checkpoint` by default.

    Yields:
        The `Progress` object of the run.

    Raises:
        ValueError: If the settings are invalid for these samples, see `SegmentationJob.check`, or the model does not
            support the job's router or concept.
        InUseError: If another run is writing to the field (a subclass of ValueError).
    """
    dataset = samples._dataset
    names, subject = writable_fields(job.field), f"field {job.field!r}"
    check_free(dataset, names, subject)  # before the model is loaded
    job.check(samples)
    references_of = _ReferenceReader(dataset, job)
    pipeline = pipeline or get_pipeline(job.checkpoint)
    check_pipeline(pipeline, job.router, job.concept)
    ids, total = pending_ids(samples, job), targets_of(samples, job).count()
    with locked(dataset, names, subject, job.key(dataset), len(ids)) as lock:
        with _DECLARATION_LOCK:  # runs that start concurrently would declare the same fields
            catch_up(samples)
            check_output_fields(dataset, job.field, job.outputs)
            declare_prediction_fields(dataset, job.field, job.outputs)
            run = job.keep(dataset)
        progress = Progress(total=len(ids), skipped=total - len(ids))
        progress.bad_references = references_of.find_bad(ids)
        yield progress
        yield from _segment_batches(samples, job, ids, run, pipeline, references_of, progress, lock)
        if "segmentation" in job.outputs:
            name_masks(dataset, job.field)


def _segment_batches(
    samples: fo.core.collections.SampleCollection,
    job: SegmentationJob,
    ids: Sequence[str],
    run: str,
    pipeline: ConceptSegmentationPipeline,
    references_of: _ReferenceReader,
    progress: Progress,
    lock: Lock,
) -> Iterator[Progress]:
    dataset, everything = samples._dataset, whole_dataset(samples)
    fields = output_fields(job.field, job.outputs)
    settings = {"checkpoint": job.checkpoint, "router": job.router, "run": run}
    settings |= {"concept": job.concept_name} if job.concept_name else {}
    folder = Path(job.folder) if job.folder else default_folder(dataset.name, job.field)
    needed = [name for name in (job.prompt_field, job.reference_ids_field) if name is not None]
    stale = stale_fields(dataset, job.field, job.outputs)
    for start in range(0, len(ids), job.batch_size):
        batch_ids = ids[start : start + job.batch_size]
        view = everything.select(batch_ids, ordered=True)
        batch = list(view.select_fields([*needed, *stale, *fields.values()]))
        prompts = [_prompt_of(sample, job) for sample in batch]
        results = _segment(pipeline, batch, prompts, job, references_of)
        with view.save_context(batch_size=len(batch_ids)) as context:
            for sample, prompt, result in zip(batch, prompts, results, strict=True):
                attributes = attributes_of(result, prompt, **settings)
                image, label = sample.filepath, job.label
                try:
                    labels = to_labels(result, attributes, fields, folder, sample.id, image, label)
                except (OSError, ValueError) as error:  # for example, the disk is full
                    result = ConceptSegmentation.failed(f"mask cannot be written: {error}.", prompt)
                    attributes = attributes_of(result, prompt, **settings)
                    labels = to_labels(result, attributes, fields, image=image)
                for output, name in fields.items():
                    sample[name] = labels.get(output)
                for name in stale:
                    sample[name] = None
                context.save(sample)
                if result.error is not None:
                    progress.errors[sample.id] = result.error
        deleted = set(batch_ids).difference(view.values("id"))
        progress.errors |= dict.fromkeys(deleted, "sample was deleted during the run.")
        progress.done += len(batch_ids)
        lock.cancelled = progress.cancelled = lock.beat(progress.done) and progress.done < progress.total
        yield progress
        if progress.cancelled:
            return


def cancel_segmentation(samples: fo.core.collections.SampleCollection, field: str = "concept") -> bool:
    """Request that the run that writes to a field, in any process, stops after the current batch.

    The predictions made so far are kept; the same job resumes the run.

    Returns:
        Whether such a run exists.
    """
    return request_cancel(samples._dataset, field)


def targets_of(
    samples: fo.core.collections.SampleCollection, job: SegmentationJob
) -> fo.core.collections.SampleCollection:
    """Return the samples without the job's reference samples."""
    return samples.exclude(job.reference_ids) if job.reference_ids else samples


def pending_ids(samples: fo.core.collections.SampleCollection, job: SegmentationJob) -> list[str]:
    """Return the ids of the samples that a run has to segment."""
    ids, dataset = targets_of(samples, job).values("id"), samples._dataset
    if not dataset.has_field(job.field):
        return ids
    interrupted = find_interrupted(dataset, job) if job.skip_existing is None else None
    if not job.skip_existing and interrupted is None:
        return ids
    pending = F(job.field) == None  # noqa: E711 (FiftyOne expression)
    if dataset.has_field(f"{job.field}.error"):
        pending |= F(f"{job.field}.error") != None  # noqa: E711
    if interrupted is not None:
        pending |= F(f"{job.field}.run") != interrupted.run
    # Match in the dataset, as the view may hide the field.
    pending_in_dataset = set(whole_dataset(samples).match(pending).values("id"))
    return [sample_id for sample_id in ids if sample_id in pending_in_dataset]


def find_interrupted(dataset: fo.Dataset, job: SegmentationJob) -> Holder | None:
    """Return the last run that wrote to the job's field, if it had the same settings and was interrupted."""
    last = interrupted_run(dataset, job.field)
    return last if last is not None and last.run == job.key(dataset) else None


class _ReferenceReader:
    """Returns the references of a sample: the job's, or the sample's own, which are read from the dataset."""

    def __init__(self, dataset: fo.Dataset, job: SegmentationJob) -> None:
        self._dataset, self._job = dataset, job
        self._shared = job.shared_references(dataset)
        self._label_field = job.label_field(dataset)
        self._read = lru_cache(maxsize=256)(self._read_uncached)

    def __call__(self, sample: fo.Sample) -> Sequence[Reference]:
        if self._job.reference_ids_field is None:
            return self._shared
        ids = tuple(sample[self._job.reference_ids_field] or ())
        if sample.id in ids:
            raise ValueError("sample is listed among its own references; remove it from the list.")
        return self._read(ids)

    def find_bad(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the error of each of the samples' own references that cannot be used, by file path."""
        field = self._job.reference_ids_field
        if field is None:
            return {}
        everything = whole_dataset(self._dataset)
        listed = everything.select(ids).values(field)
        reference_ids = {reference_id for references in listed for reference_id in references or ()}
        faults = {}
        for sample in everything.select([value for value in reference_ids if ObjectId.is_valid(value)]):
            try:
                self._references([sample])
            except ValueError as error:
                faults[sample.filepath] = str(error)
        return faults

    def _read_uncached(self, ids: tuple[str, ...]) -> list[Reference]:
        return self._references(samples_by_id(self._dataset, ids)) if ids else []

    def _references(self, samples: Sequence[fo.Sample]) -> list[Reference]:
        return references_from(
            samples,
            self._label_field,
            self._job.proxy,
            unmarked=True,
            label_ids=self._job.reference_label_ids,
            boxes_together=self._job.boxes_together,
        )


def _prompt_of(sample: fo.Sample, job: SegmentationJob) -> str:
    if job.prompt_field is None:
        return job.prompt or ("" if job.concept is None else job.concept.prompt)
    value = sample[job.prompt_field]
    return "" if value is None else str(value)


def _segment(
    pipeline: ConceptSegmentationPipeline,
    samples: Sequence[fo.Sample],
    prompts: Sequence[str],
    job: SegmentationJob,
    references_of: _ReferenceReader,
) -> list[ConceptSegmentation]:
    """Return the results of a batch; an error of a sample is stored in its own result."""
    results: dict[int, ConceptSegmentation] = {}
    items = {}
    for index, (sample, prompt) in enumerate(zip(samples, prompts)):
        try:
            if not prompt.strip():
                raise ValueError(f"prompt field {job.prompt_field!r} is empty; enter a prompt.")
            items[index] = {"image": sample.filepath, "prompt": prompt, "references": references_of(sample)}
        except (ValueError, OSError) as error:
            results[index] = ConceptSegmentation.failed(str(error), prompt)
    settings: dict[str, Any] = {"router": job.router, "return_heatmap": "heatmap" in job.outputs}
    settings |= {} if job.concept is None else {"concept": job.concept}
    for index, result in zip(items, segment_batch(pipeline, list(items.values()), settings), strict=True):
        results[index] = result
    return [results[index] for index in range(len(samples))]
