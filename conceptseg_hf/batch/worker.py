"""The worker of a batch job: it holds the model and turns batches of images into rows on disk."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import one_line
from ..inputs import PreparedSample
from ..outputs import ConceptSegmentation
from .errors import BatchError
from .items import ImageItem
from .job import BatchJob
from .output import write_batch
from .rows import make_row

BATCHES_AHEAD, THREADS = 2, min(os.cpu_count() or 1, 16)
"""Batches, and threads that read and preprocess their images, while the model works on another batch."""

_Prepared = tuple[ImageItem, Future[PreparedSample]]


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch.

    Attributes:
        batch: Index of the batch.
        routes: Number of images per route.
        errors: Name and error of each failed image.
    """

    batch: int
    routes: Counter[str] = field(default_factory=Counter)
    errors: tuple[tuple[str, str], ...] = ()


class Worker:
    """A model that processes the batches of a job.

    Args:
        job: The job.
        folder: The output folder.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If the concept was made with other weights.
    """

    def __init__(self, job: BatchJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.model, self.processor = job.load()
        if job.concept is not None:
            job.concept.check_model(self.model)
        else:
            self.processor.warn_of_unknown_words(job.text)

    def run(self, batches: Iterable[int]) -> Iterator[BatchResult]:
        """Process batches in order; each is on disk when its result is yielded."""
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(THREADS, "prepare", torch.set_num_threads, (threads,))
        ahead: deque[tuple[int, list[_Prepared]]] = deque()
        try:
            for batch in batches:
                rows = self.job.rows_of(batch)
                items = self.job.images.read(rows.start, rows.stop)
                ahead.append((batch, [(item, pool.submit(self._prepare, item)) for item in items]))
                if len(ahead) > BATCHES_AHEAD:
                    yield self._finish(*ahead.popleft())
            while ahead:
                yield self._finish(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _finish(self, batch: int, prepared: list[_Prepared]) -> BatchResult:
        items = [item for item, _ in prepared]
        results = self.segment(batch, [sample.result() for _, sample in prepared])
        write_batch(self.folder, batch, list(map(make_row, items, results)))
        routes = Counter(result.route for result in results if result.route is not None)
        errors = tuple((item.name, result.error) for item, result in zip(items, results) if result.error)
        return BatchResult(batch, routes, errors)

    def _prepare(self, item: ImageItem) -> PreparedSample:
        """Read and preprocess an image; one that cannot be read yields a sample with an error."""
        prompt = self.job.text
        if item.error is not None:
            return PreparedSample.failed(prompt, item.error)
        try:
            return self.processor.prepare(item.image, prompt, self.job.references, lazy=True)
        except (ValueError, TypeError, OSError, MemoryError) as error:
            return PreparedSample.failed(prompt, one_line(error))

    def segment(self, batch: int, samples: Sequence[PreparedSample]) -> list[ConceptSegmentation]:
        """Segment the samples of a batch.

        If this fails, the samples are processed one by one, so that one of them cannot fail the others.

        Raises:
            BatchError: If each of several samples fails, because the fault is then not that of an image.
        """
        try:
            return self._segment(batch, samples)
        except (RuntimeError, MemoryError) as error:
            results = [self._segment_alone(batch, sample) for sample in samples]
            valid = [sample for sample in samples if sample.error is None]
            if len(valid) > 1 and all(result.mask is None for result in results):
                raise BatchError(
                    f"batch {batch}: the model fails on every image: {one_line(error)}"
                ) from error
            return results

    def _segment_alone(self, batch: int, sample: PreparedSample) -> ConceptSegmentation:
        try:
            return self._segment(batch, [sample])[0]
        except (RuntimeError, MemoryError) as error:
            return ConceptSegmentation.failed(
                f"the model fails on this image: {one_line(error)}", sample.prompt
            )

    def _segment(self, batch: int, samples: Sequence[PreparedSample]) -> list[ConceptSegmentation]:
        torch.manual_seed(batch)  # for checkpoints that sample: a resumed job writes the same completions
        return self.model.segment(
            list(samples),
            self.job.router,
            self.job.generation(),
            processor=self.processor,
            concept=self.job.concept,
        )
