"""The loop behind the operator: read, segment, write a file, then its label, sample by sample.

What is written is complete: a mask is on disk before a label names it, and each label is saved as soon as its batch is
segmented. A killed run therefore loses the batch in work, and `skip_existing` does the rest of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import fiftyone as fo
from bson import ObjectId
from fiftyone import ViewField as F

from ...outputs import ConceptSegmentation
from ...pipelines import ConceptSegmentationPipeline
from ...references import Reference
from .checkpoints import get_pipeline, segment_batch
from .field_locks import Holder, Lock, check_free, interrupted_run, locked, request_cancel
from .files import default_folder
from .job import SegmentationJob
from .labels import attributes_of, to_labels
from .progress import Progress
from .reference_samples import references_from, samples_by_id
from .runs import catch_up, check_output_fields, name_masks, stale_fields, writable_fields
from .schema import declare_prediction_fields, output_fields, whole_dataset

_DECLARING = threading.Lock()


def segment_collection(
    samples: fo.core.collections.SampleCollection,
    job: SegmentationJob,
    pipeline: ConceptSegmentationPipeline | None = None,
) -> Iterator[Progress]:
    """Segments samples; yields the progress at the start and after every batch.

    One run at a time writes to a field. A run that is killed, cancelled (`cancel_segmentation`) or not iterated to its
    end keeps what it has done; the same job then does the rest.

    Args:
        samples: A dataset or view of images. Samples with an error of their own get a label with `error` and an empty
            mask; the job's reference samples are left out.
        job: What to do. Its settings are kept as a custom run, which labels name in `run`.
        pipeline: The model; the one of `job.checkpoint` by default.

    Raises:
        ValueError: If the job cannot be done; the message is one sentence.
        InUseError: If another run writes to the field; it is a ValueError that says which.
    """
    dataset = samples._dataset
    names, subject = writable_fields(job.field), f"field {job.field!r}"
    check_free(dataset, names, subject)  # before the model is loaded
    job.check(samples)
    references_of = _ReferenceReader(dataset, job)
    pipeline = pipeline or get_pipeline(job.checkpoint)
    ids, total = pending_ids(samples, job), targets_of(samples, job).count()
    with locked(dataset, names, subject, job.key(dataset), len(ids)) as lock:
        with _DECLARING:  # two runs that begin at once would declare the same fields
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
                except (OSError, ValueError) as error:  # a full disk, for example
                    result = ConceptSegmentation.failed(f"the mask cannot be written: {error}.", prompt)
                    attributes = attributes_of(result, prompt, **settings)
                    labels = to_labels(result, attributes, fields, image=image)
                for output, name in fields.items():
                    sample[name] = labels.get(output)
                for name in stale:
                    sample[name] = None
                context.save(sample)
                if result.error is not None:
                    progress.errors[sample.id] = result.error
        gone = set(batch_ids).difference(view.values("id"))
        progress.errors |= dict.fromkeys(gone, "the sample was deleted during the run.")
        progress.done += len(batch_ids)
        lock.cancelled = progress.cancelled = lock.beat(progress.done) and progress.done < progress.total
        yield progress
        if progress.cancelled:
            return


def cancel_segmentation(samples: fo.core.collections.SampleCollection, field: str = "concept") -> bool:
    """Asks the run that writes to a field, in whatever process, to end after the batch in work.

    What it has done stays; the same job does the rest.

    Returns:
        Whether there is such a run.
    """
    return request_cancel(samples._dataset, field)


def targets_of(
    samples: fo.core.collections.SampleCollection, job: SegmentationJob
) -> fo.core.collections.SampleCollection:
    """The samples without those that are references for all."""
    return samples.exclude(job.reference_ids) if job.reference_ids else samples


def pending_ids(samples: fo.core.collections.SampleCollection, job: SegmentationJob) -> list[str]:
    """The ids of the samples that a run has to do."""
    ids, dataset = targets_of(samples, job).values("id"), samples._dataset
    if not dataset.has_field(job.field):
        return ids
    interrupted = find_interrupted(dataset, job) if job.skip_existing is None else None
    if not job.skip_existing and interrupted is None:
        return ids
    left = F(job.field) == None  # noqa: E711 (an expression of FiftyOne)
    if dataset.has_field(f"{job.field}.error"):
        left |= F(f"{job.field}.error") != None  # noqa: E711
    if interrupted is not None:
        left |= F(f"{job.field}.run") != interrupted.run
    left_ids = set(
        whole_dataset(samples).match(left).values("id")
    )  # of the dataset: a view may hide the field
    return [sample_id for sample_id in ids if sample_id in left_ids]


def find_interrupted(dataset: fo.Dataset, job: SegmentationJob) -> Holder | None:
    """The last run into the job's field, if it had its settings and ended before it was done."""
    last = interrupted_run(dataset, job.field)
    return last if last is not None and last.run == job.key(dataset) else None


class _ReferenceReader:
    """The references of a sample: those of the job, or the sample's own, which are read from the dataset."""

    def __init__(self, dataset: fo.Dataset, job: SegmentationJob) -> None:
        self._dataset, self._job = dataset, job
        self._shared = job.shared_references(dataset)
        self._label_field = job.label_field(dataset)
        self._read = lru_cache(maxsize=256)(self._read_anew)

    def __call__(self, sample: fo.Sample) -> Sequence[Reference]:
        if self._job.reference_ids_field is None:
            return self._shared
        ids = tuple(sample[self._job.reference_ids_field] or ())
        if sample.id in ids:
            raise ValueError("the sample is listed among its own references; take it out.")
        return self._read(ids)

    def find_bad(self, ids: Sequence[str]) -> dict[str, str]:
        """What is wrong with those of the samples' own references that cannot be used, by their files."""
        field = self._job.reference_ids_field
        if field is None:
            return {}
        everything = whole_dataset(self._dataset)
        listed = everything.select(ids).values(field)
        wanted = {reference_id for references in listed for reference_id in references or ()}
        faults = {}
        for sample in everything.select([value for value in wanted if ObjectId.is_valid(value)]):
            try:
                self._references([sample])
            except ValueError as error:
                faults[sample.filepath] = str(error)
        return faults

    def _read_anew(self, ids: tuple[str, ...]) -> list[Reference]:
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
        return job.prompt or ""
    value = sample[job.prompt_field]
    return "" if value is None else str(value)


def _segment(
    pipeline: ConceptSegmentationPipeline,
    samples: Sequence[fo.Sample],
    prompts: Sequence[str],
    job: SegmentationJob,
    references_of: _ReferenceReader,
) -> list[ConceptSegmentation]:
    """The results of a batch; whatever a sample is guilty of ends in its own result."""
    results: dict[int, ConceptSegmentation] = {}
    items = {}
    for index, (sample, prompt) in enumerate(zip(samples, prompts)):
        try:
            if not prompt.strip():
                raise ValueError(f"there is no prompt in {job.prompt_field!r}; write one.")
            items[index] = {"image": sample.filepath, "prompt": prompt, "references": references_of(sample)}
        except (ValueError, OSError) as error:
            results[index] = ConceptSegmentation.failed(str(error), prompt)
    settings = {"router": job.router, "return_heatmap": "heatmap" in job.outputs}
    for index, result in zip(items, segment_batch(pipeline, list(items.values()), settings), strict=True):
        results[index] = result
    return [results[index] for index in range(len(samples))]
