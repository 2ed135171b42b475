"""The worker of a batch job: images that fail in the model, and reading ahead."""

from __future__ import annotations

import threading

import pyarrow.parquet as pq
import pytest
import torch

from conceptseg_hf.batch import worker as worker_module
from conceptseg_hf.batch.errors import BatchError
from conceptseg_hf.batch.worker import BATCHES_AHEAD, Worker


@pytest.fixture()
def worker(make_images, make_job, tmp_path):
    return Worker(make_job(make_images(14, damaged=(4,))), tmp_path / "out")


def fail_on(worker: Worker, monkeypatch, sizes: set[tuple[int, int]], error: Exception) -> list[int]:
    """Let the model fail on batches with an image of these sizes; returns the sizes of all batches."""
    segment, batches = worker.model.segment, []

    def failing(samples, *arguments, **options):
        batches.append(len(samples))
        if any(sample.error is None and sample.frame.image_size in sizes for sample in samples):
            raise error
        return segment(samples, *arguments, **options)

    monkeypatch.setattr(worker.model, "segment", failing)
    return batches


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nTried"), MemoryError()])
def test_image_that_fails_in_the_model_does_not_fail_its_batch(worker, monkeypatch, error):
    from .conftest import draw

    whole = next(worker.run([0]))
    expected = pq.read_table(worker.folder / "unfinished" / "00000000.parquet").to_pylist()
    draw(1, (60, 50)).save(worker.job.images.root + "/001.png")
    batches = fail_on(worker, monkeypatch, {(60, 50)}, error)
    result = next(worker.run([0]))
    assert batches[:4] == [3, 1, 1, 1]
    text = "CUDA out of memory. Tried" if isinstance(error, RuntimeError) else "MemoryError"
    assert result.errors == (("001.png", f"the model fails on this image: {text}"),)
    assert whole.routes["concept"] == 3 and result.routes["concept"] == 2
    rows = pq.read_table(worker.folder / "unfinished" / "00000000.parquet").to_pylist()
    assert [row["mask"] == other["mask"] for row, other in zip(rows, expected)] == [True, False, True]
    assert rows[1]["mask"] is None and rows[1]["error"] == result.errors[0][1]


def test_model_that_fails_on_every_image_ends_the_job(worker, monkeypatch):
    fail_on(worker, monkeypatch, {(48, 40)}, RuntimeError("device-side assert"))
    with pytest.raises(BatchError, match="batch 0: the model fails on every image: device-side assert"):
        next(worker.run([0]))
    assert not (worker.folder / "unfinished").exists()


def test_reads_ahead_a_bounded_number_of_batches_in_threads(worker, monkeypatch):
    prepared, threads = [], set()
    prepare = worker.processor.prepare

    def counted(image, *arguments, **options):
        prepared.append(image)
        threads.add(threading.current_thread())
        return prepare(image, *arguments, **options)

    monkeypatch.setattr(worker.processor, "prepare", counted)
    most = 0
    for number, result in enumerate(worker.run(range(5))):
        assert result.batch == number
        most = max(most, len(prepared) - 3 * (number + 1))
    assert len(prepared) == 14 and most <= 3 * BATCHES_AHEAD
    assert threading.main_thread() not in threads and len(threads) <= worker_module.THREADS


def test_sampling_depends_on_the_batch_only(worker, monkeypatch):
    """A checkpoint whose generation settings sample writes the same completions after an interruption."""
    drawn = []
    segment = worker.model.segment

    def sampled(*arguments, **options):
        drawn.append(torch.rand(()).item())
        return segment(*arguments, **options)

    monkeypatch.setattr(worker.model, "segment", sampled)
    list(worker.run([0, 1, 2]))
    list(worker.run([2, 1]))
    assert len(set(drawn)) == 3 and drawn[3:] == [drawn[2], drawn[1]]
