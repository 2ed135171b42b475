"""The loop behind the operator: read, segment, write a file, then its label, sample by sample.

What is written is complete: a mask is on disk before a label names it, and each label is saved as soon as its batch is
segmented. A killed run therefore loses the batch in work, and `skip_existing` does the rest of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import fiftyone as fo
from fiftyone import ViewField as F

from ...images import load_image, load_mask
from ...outputs import ConceptSegmentation
from ...pipelines import ConceptSegmentationPipeline
from ...references import Reference
from .checkpoints import get_pipeline, segment_batch
from .files import default_folder
from .job import SegmentationJob
from .labels import attributes_of, to_labels
from .reference_samples import references_from, resolve_label_field, samples_by_id
from .runs import stale_fields
from .schema import declare_prediction_fields, output_fields, whole_dataset

_DECLARING = threading.Lock()


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: Samples to do.
        done: Samples done, those with errors included.
        skipped: Samples that had a prediction before.
        errors: Error of each sample that failed, by sample id.
    """

    total: int
    done: int = 0
    skipped: int = 0
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share that is done, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    def plus(self, part: Progress) -> Progress:
        """This progress, and a part of its samples done."""
        return replace(self, done=self.done + part.done, errors=self.errors | part.errors)

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} segmented"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{len(self.errors)} with an error"] if self.errors else []
        return ", ".join(parts)


def segment_collection(
    samples: fo.core.collections.SampleCollection,
    job: SegmentationJob,
    pipeline: ConceptSegmentationPipeline | None = None,
) -> Iterator[Progress]:
    """Segments samples; yields the progress at the start and after every batch.

    Args:
        samples: A dataset or view of images. Samples with an error of their own get a label with `error` and no mask;
            the job's reference samples are left out.
        job: What to do. Its settings are kept as a custom run, which labels name in `run`.
        pipeline: The model; the one of `job.checkpoint` by default.

    Raises:
        ValueError: If the job cannot be done; the message is one sentence.
    """
    job.check(samples)
    dataset = samples._dataset
    references_of = _ReferenceReader(dataset, job)
    pipeline = pipeline or get_pipeline(job.checkpoint)
    with _DECLARING:  # two runs that begin at once would declare the same fields
        declare_prediction_fields(dataset, job.field, job.outputs)
    fields = output_fields(job.field, job.outputs)
    ids, total = pending_ids(samples, job), targets_of(samples, job).count()
    progress = Progress(total=len(ids), skipped=total - len(ids))
    yield progress

    settings = {"checkpoint": job.checkpoint, "router": job.router, "run": job.keep(dataset)}
    folder = Path(job.folder) if job.folder else default_folder(dataset.name, job.field)
    needed = [name for name in (job.prompt_field, job.reference_ids_field) if name is not None]
    everything = whole_dataset(samples)
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
                try:
                    labels = to_labels(result, attributes, fields, folder, sample.id)
                except (OSError, ValueError) as error:  # a full disk, or a shape that FiftyOne cannot hold
                    result = ConceptSegmentation.failed(f"the mask cannot be written: {error}.", prompt)
                    labels = to_labels(result, attributes | {"error": result.error}, fields)
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
        yield progress


def targets_of(
    samples: fo.core.collections.SampleCollection, job: SegmentationJob
) -> fo.core.collections.SampleCollection:
    """The samples without those that are references for all."""
    return samples.exclude(job.reference_ids) if job.reference_ids else samples


def pending_ids(samples: fo.core.collections.SampleCollection, job: SegmentationJob) -> list[str]:
    """The ids of the samples that a run has to do."""
    ids, dataset = targets_of(samples, job).values("id"), samples._dataset
    if not (job.skip_existing and dataset.has_field(job.field)):
        return ids
    left = F(job.field) == None  # noqa: E711 (an expression of FiftyOne)
    if dataset.has_field(f"{job.field}.error"):
        left |= F(f"{job.field}.error") != None  # noqa: E711
    left_ids = set(
        whole_dataset(samples).match(left).values("id")
    )  # of the dataset: a view may hide the field
    return [sample_id for sample_id in ids if sample_id in left_ids]


class _ReferenceReader:
    """The references of a sample: those of the job, or the sample's own, which are read from the dataset."""

    def __init__(self, dataset: fo.Dataset, job: SegmentationJob) -> None:
        self._dataset, self._job = dataset, job
        self._shared = job.shared_references(dataset)
        for reference in self._shared:  # one that cannot be read would make every sample fail
            image = load_image(reference.image)
            if reference.mask is not None:
                load_mask(reference.mask, image.size)
        self._label_field = resolve_label_field(dataset, job.reference_label_field)
        self._read = lru_cache(maxsize=256)(self._read_anew)

    def __call__(self, sample: fo.Sample) -> Sequence[Reference]:
        if self._job.reference_ids_field is None:
            return self._shared
        ids = tuple(sample[self._job.reference_ids_field] or ())
        if sample.id in ids:
            raise ValueError("the sample is listed among its own references; take it out.")
        return self._read(ids)

    def _read_anew(self, ids: tuple[str, ...]) -> list[Reference]:
        if not ids:
            return []
        samples = samples_by_id(self._dataset, ids)
        label_ids = self._job.reference_label_ids
        return references_from(
            samples, self._label_field, self._job.proxy, unmarked=True, label_ids=label_ids
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
    results: list[ConceptSegmentation | None] = [None] * len(samples)
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
    return results
