"""Batch jobs on a Ray cluster: Ray Data's `map_batches` with actors that hold the model.

Each actor processes runs of batches with the code of the local engine and writes them to the output folder, which all
nodes must be able to access. Only counts and error messages are sent to the driver.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import first_line, one_line
from ..writing import json_text
from .errors import BatchError
from .job import BatchJob
from .output import is_written
from .worker import BatchResult, Worker

_MAX_CHUNK = 16  # batches per call of an actor
_CALLS_PER_WORKER = 8  # at least, so that all workers finish at about the same time
_OBJECT_STORE = 100_000_000  # bytes; images are read by the actors and do not pass through the object store

# For a cluster that is started on this machine: no usage reports, and all servers on the loopback address.
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class RayWorker:
    """A callable for `map_batches` that loads the model with its first chunk.

    Args:
        job: The job.
        folder: The output folder.
    """

    def __init__(self, job: BatchJob, folder: str) -> None:
        self._job, self._folder = job, Path(folder)
        self._worker: Worker | None = None

    def __call__(self, chunk: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Process the batches of a chunk, and yield one row per batch."""
        batches = [int(batch) for text in chunk["batches"] for batch in text.split()]
        # Ray repeats a chunk whose actor died; its first batches may be on disk.
        written = [batch for batch in batches if is_written(self._folder, self._job, batch)]
        for batch in written:
            yield _to_row(BatchResult(batch))
        try:
            if self._worker is None:
                self._worker = Worker(self._job, self._folder)
            for result in self._worker.run(sorted(set(batches) - set(written))):
                yield _to_row(result)
        except (ValueError, ImportError, OSError) as error:
            # Ray would repeat the chunk, and report the error with its own traceback.
            yield _to_row(BatchResult(-1), one_line(error))


def run_with_ray(
    job: BatchJob, folder: Path, batches: Sequence[int], num_workers: int | None, num_gpus: int | None
) -> Iterator[BatchResult]:
    """Process batches with actors on a Ray cluster, in any order.

    The cluster is that of the environment variable RAY_ADDRESS ("auto" on a node of a running cluster). Without it, a
    cluster is started on this machine, on the loopback address, and stopped at the end.

    Args:
        job: The job.
        folder: The output folder, which all nodes can access.
        batches: Indices of the batches.
        num_workers: Number of actors; by default one per GPU, or one.
        num_gpus: Number of GPUs; by default all of the cluster.

    Raises:
        BatchError: If Ray is not installed or the job cannot continue.
    """
    if job.model is not None and Path(job.model).exists():  # workers may have another working directory
        job = replace(job, model=str(Path(job.model).absolute()))
    external = bool(os.environ.get("RAY_ADDRESS"))
    if not external:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BatchError(
            "the engine 'ray' needs the package ray; install it with: pip install conceptseg-hf[ray]"
        ) from error
    started = not ray.is_initialized()
    try:
        if started:
            _start(ray, external, num_workers)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if num_gpus is None else num_gpus
        workers = num_workers or max(gpus, 1)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        chunks = _chunks(batches, workers)
        source = ray.data.from_items(
            [{"batches": chunk} for chunk in chunks], override_num_blocks=len(chunks)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_task_retries will be renamed in Ray 2.64
            data = source.map_batches(
                RayWorker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                num_gpus=gpus / workers,
                fn_constructor_args=(job, str(folder.absolute())),
                max_task_retries=3,  # a chunk that ends its process again and again ends the job
            )
        for row in data.iter_rows():
            if row["failure"]:
                raise BatchError(row["failure"])
            errors = tuple((name, error) for name, error in json.loads(row["errors"]))
            yield BatchResult(int(row["batch"]), Counter(json.loads(row["routes"])), errors)
    except ray.exceptions.RayError as error:
        raise BatchError(
            f"Ray ended the job ({first_line(error).rstrip('.')}); run it again to continue."
        ) from error
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, external: bool, num_workers: int | None) -> None:
    if external:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, num_workers or 1),
        object_store_memory=_OBJECT_STORE,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _chunks(batches: Sequence[int], workers: int) -> list[str]:
    """Divide batches into runs, written as text, which Ray passes to an actor one at a time."""
    size = min(max(len(batches) // (workers * _CALLS_PER_WORKER), 1), _MAX_CHUNK)
    return [" ".join(map(str, batches[start : start + size])) for start in range(0, len(batches), size)]


def _to_row(result: BatchResult, failure: str = "") -> dict[str, list[Any]]:
    routes, errors = json_text(dict(result.routes)), json_text(list(result.errors))
    return {"batch": [result.batch], "routes": [routes], "errors": [errors], "failure": [failure]}
