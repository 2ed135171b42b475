"""Running a batch job with an engine, and its report."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..progress import progress_bar
from .exports import FORMATS, export
from .job import BatchJob
from .output import RESULTS, OutputFolder, open_output
from .worker import BatchResult, Worker

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class BatchReport:
    """What became of the images of a job.

    Attributes:
        routes: Number of images per route.
        errors: Number of failed images.
        first_error: Error of the first failed image, or None.
        images: Number of images.
        computed: Number of images that this run computed; the others were finished before.
        seconds: Duration of this run.
        outputs: Files and folders with the results.
    """

    routes: Counter[str]
    errors: int
    first_error: str | None
    images: int
    computed: int
    seconds: float
    outputs: tuple[Path, ...]

    def to_table(self) -> str:
        """Return the report as a table."""
        counts = [*sorted(self.routes.items()), ("errors", self.errors)]
        rows = [("images", str(self.images), "")]
        rows += [(f"  {name}", str(count), f"{count / self.images:8.1%}") for name, count in counts]
        if self.computed:
            note = "" if self.computed == self.images else f"  ({self.computed} images in this run)"
            rows.append(("images/s", f"{self.computed / self.seconds:.2f}", note))
        names, values = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{name:<{names}}  {value:>{values}}{note}" for name, value, note in rows)


def run_batch(
    job: BatchJob,
    folder: str | os.PathLike,
    engine: str = "local",
    format: str = "parquet",
    num_workers: int | None = None,
    num_gpus: int | None = None,
    retry_failed: bool = False,
    progress: bool = False,
    on_batch: Callable[[BatchResult], None] | None = None,
) -> BatchReport:
    """Segment all images of a job, or those that an earlier run of the same job has not finished.

    The results are Parquet files in `folder/results`; see `rows.schema`. Their bytes depend on the job only, not on the
    engine, the number of workers, or interruptions. PyTorch's global random generator is seeded for each batch.

    Args:
        job: The job.
        folder: The output folder. A folder with the results of another job is refused.
        engine: `"local"`, or `"ray"` for several devices or machines; see `ray_engine.run_with_ray`.
        format: `"parquet"`; `"coco"` to also write `coco.json`; `"png"` to also write the masks.
        num_workers: Number of Ray actors.
        num_gpus: Number of GPUs that Ray's actors share.
        retry_failed: Whether to compute batches with failed images again.
        progress: Whether to show a progress bar.
        on_batch: Function that is called with the result of each finished batch.

    Raises:
        BatchError: If the job cannot continue; finished batches are kept.
        OSError: If files cannot be written.
        ValueError: If an argument is invalid, or the folder holds the results of another job.
    """
    if engine not in ENGINES or format not in FORMATS:
        raise ValueError(
            f"engine is {engine!r} and format {format!r}; use one of {', '.join(ENGINES)} and one of "
            f"{', '.join(FORMATS)}."
        )
    start = time.perf_counter()
    with open_output(folder, job) as output:
        if retry_failed:
            output.retry_failed()
        pending = output.pending()
        total, computed = len(job.images), sum(len(job.rows_of(batch)) for batch in pending)
        bar = progress_bar(total, "images", initial=total - computed) if progress else None
        try:
            for result in _results(job, output.folder, pending, engine, num_workers, num_gpus):
                output.finish(result.batch)
                if bar is not None:
                    bar.update(len(job.rows_of(result.batch)))
                if on_batch is not None:
                    on_batch(result)
        finally:
            if bar is not None:
                bar.close()
        seconds = time.perf_counter() - start
        output.close()
        files = (output.folder / RESULTS, *export(output, job, format))
        return _report(output, total, computed, seconds, files)


def _results(
    job: BatchJob,
    folder: Path,
    batches: Sequence[int],
    engine: str,
    num_workers: int | None,
    num_gpus: int | None,
) -> Iterator[BatchResult]:
    if not batches:
        return iter(())
    if engine == "local":
        return Worker(job, folder).run(batches)
    from .ray_engine import run_with_ray

    return run_with_ray(job, folder, batches, num_workers, num_gpus)


def _report(
    output: OutputFolder, images: int, computed: int, seconds: float, files: tuple[Path, ...]
) -> BatchReport:
    routes: Counter[str] = Counter()
    errors, first_error = 0, None
    for row in output.read(["image", "route", "error"]):
        if row["error"] is None:
            routes[row["route"]] += 1
        else:
            errors += 1
            first_error = first_error or f"{row['image']}: {row['error']}"
    return BatchReport(routes, errors, first_error, images, computed, seconds, files)
