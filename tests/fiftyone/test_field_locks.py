"""Tests of locking fields, resuming interrupted runs, and cancelling runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_pipeline import FakePipeline
from PIL import Image

pytestmark = pytest.mark.slow

# A slow run in another process; a line on stdin starts it again.
OTHER_PROCESS = """
import sys, time
sys.path.append(sys.argv[2])
import fiftyone as fo
from fake_pipeline import FakePipeline
from PIL import Image
from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

def slow(items, **settings):
    time.sleep(0.2)
    masks = [Image.new("L", Image.open(item["image"]).size, 255) for item in items]
    return [{"mask": mask, "label": "star", "score": 1.0} for mask in masks]

targets = fo.load_dataset(sys.argv[1]).load_saved_view("targets")
for _ in range(2):
    job = SegmentationJob(prompt="star", batch_size=1)
    for progress in segment_collection(targets, job, pipeline=FakePipeline(slow)):
        print(progress.done, progress.total, flush=True)
    print("ended", progress.cancelled, flush=True)
    sys.stdin.readline()
"""


def full_masks(items, **settings):
    """Return results with masks that contain all pixels."""
    masks = [Image.new("L", Image.open(item["image"]).size, 255) for item in items]
    return [{"mask": mask, "label": "star", "score": 1.0} for mask in masks]


def run(samples, field="concept", prompt="star", **settings):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    job = SegmentationJob(field, prompt=prompt, **{"batch_size": 2} | settings)
    return segment_collection(samples, job, pipeline=FakePipeline(full_masks))


def test_a_second_run_into_a_field_is_refused(fo, make_dataset):
    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets")
    first = run(targets, outputs=("segmentation", "detections"))
    for _ in range(2):
        next(first)
    holder = rf"\(2 of 6 done, since [-\d]+ [:\d]+, process {os.getpid()} on .*\)"
    for field, settings in (
        ("concept", {}),
        ("concept", {"prompt": "circle", "outputs": ("detections",)}),
        ("concept_detections", {"outputs": ("detections",)}),  # written by the first run, too
        ("concept_other_route", {}),  # cleared by the first run
    ):
        with pytest.raises(
            ValueError, match=rf"^field '{field}' is being written by another run {holder}; wait for"
        ):
            next(run(targets, field, **settings))
    *_, elsewhere = run(targets, "another", prompt="circle")
    *_, progress = first
    assert (progress.done, elsewhere.done) == (6, 6) and not progress.cancelled
    assert set(targets.values("concept.prompt")) == {"star"}
    *_, again = run(targets, prompt="circle")
    assert again.done == 6 and set(targets.values("concept.prompt")) == {"circle"}


def test_run_of_another_process_is_detected_cancelled_and_resumed(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import cancel_segmentation
    from conceptseg_hf.integrations.fiftyone.field_locks import holders, interrupted_run

    dataset = make_dataset(30)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, dataset.name, str(Path(__file__).parent)], **pipes
    )
    try:
        assert other.stdout.readline() == "0 30\n"
        with pytest.raises(ValueError, match=rf"field 'concept' is being written .* process {other.pid} on "):
            next(run(dataset.load_saved_view("targets")))
        assert [(holder.name, holder.process) for holder in holders(dataset)] == [("concept", other.pid)]
        assert cancel_segmentation(dataset) and not cancel_segmentation(dataset, "another")
        done = _done_when_cancelled(other)
        dataset.reload()
        assert 0 < done < 30 and len(dataset.exists("concept")) == done
        assert (interrupted_run(dataset, "concept").done, holders(dataset)) == (done, [])

        # Resume the run, then kill it.
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == f"0 {30 - done}\n"
        assert other.stdout.readline() == f"1 {30 - done}\n"
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        other.stdin.close()
        other.stdout.close()
    assert holders(dataset) == []
    before = dict(zip(*dataset.exists("concept").values(["id", "concept.id"])))
    assert len(before) > done
    dataset.reload()
    start, *_, progress = run(dataset.load_saved_view("targets"))
    assert (start.total, progress.done, start.skipped) == (30 - len(before), 30 - len(before), len(before))
    after = dict(zip(*dataset.exists("concept").values(["id", "concept.id"])))
    assert before.items() <= after.items() and len(after) == 30
    assert interrupted_run(dataset, "concept") is None


def _done_when_cancelled(process) -> int:
    lines = list(iter(process.stdout.readline, "ended True\n"))
    return int(lines[-1].split()[0])


def test_only_a_run_with_equal_settings_is_resumed(make_dataset):
    """After other settings or a finished run, all samples are segmented again."""
    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets")

    def totals(*settings):
        return [next(iter(run(targets, **some))).total for some in settings]  # each run is interrupted again

    list(run(targets, prompt="circle"))
    for stop in (run(targets), run(targets)):
        next(stop), next(stop)
        stop.close()
    assert len(targets.match({"concept.prompt": "star"})) == 4  # two per run
    assert totals({}, {"skip_existing": False}, {"skip_existing": True}, {"prompt": "circle"}) == [2, 6, 0, 6]
    assert totals({}) == [6]  # the last run had other settings
    list(run(targets))
    assert totals({}) == [6]


def test_a_run_cancelled_in_its_last_batch_is_complete(make_dataset):
    from conceptseg_hf.integrations.fiftyone import cancel_segmentation
    from conceptseg_hf.integrations.fiftyone.field_locks import interrupted_run

    dataset = make_dataset(2)
    last_batch = run(dataset.load_saved_view("targets"))
    next(last_batch)
    assert cancel_segmentation(dataset)
    [last] = last_batch
    assert (last.done, last.cancelled, interrupted_run(dataset, "concept")) == (2, False, None)


def test_an_abandoned_generator_releases_its_lock(make_dataset):
    """Closing a page of the App leaves the generator in a reference cycle, as here."""
    dataset = make_dataset(4)
    abandoned = [run(dataset.load_saved_view("targets"))]
    next(abandoned[0])
    abandoned.append(abandoned)
    del abandoned
    start, *_ = run(dataset.load_saved_view("targets"), prompt="circle")
    assert start.total == 4


def test_lock_without_heartbeat_expires_and_its_run_raises(make_dataset):
    from conceptseg_hf.integrations.fiftyone import field_locks

    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets")
    silent = run(targets)
    next(silent)
    elsewhere = {"$set": {"host": "elsewhere", "beat": time.time() - 60}}
    field_locks._collection().update_many({"dataset": dataset._doc.id}, elsewhere)
    with pytest.raises(ValueError, match="on elsewhere"):
        next(run(targets, prompt="circle"))
    long_ago = {"$set": {"beat": time.time() - 3600}}
    field_locks._collection().update_many({"dataset": dataset._doc.id}, long_ago)
    taking_over = run(targets, prompt="circle")
    next(taking_over)
    with pytest.raises(ValueError, match="field 'concept' was taken over by another run"):
        next(silent)
    *_, progress = taking_over
    assert progress.done == 6 and set(targets.values("concept.prompt")) == {"circle"}
    assert field_locks._collection().count_documents({"dataset": dataset._doc.id}) == 0


def test_loads_and_evaluations_are_locked(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts, load_concept_benchmark
    from conceptseg_hf.integrations.fiftyone.benchmarks import LOADING, import_benchmark
    from conceptseg_hf.integrations.fiftyone.field_locks import locked, request_cancel

    dataset = make_dataset(2)
    load = import_benchmark("concept-shapes", None, "test", 50, dataset.name)
    next(load)
    with pytest.raises(ValueError, match=f"dataset {dataset.name!r} is being written by another run"):
        load_concept_benchmark(limit=3, dataset_name=dataset.name)
    assert request_cancel(dataset, LOADING)
    assert list(load) == [(20, 50)]
    targets = dataset.match({"role": "target"})
    assert len(targets) == 20
    load_concept_benchmark(limit=21, dataset_name=dataset.name)
    assert len(targets) == 21 == len(set(targets.values("episode")))

    list(run(targets))
    with (
        locked(dataset, ["(evaluation 'run')"], "evaluation 'run'"),
        pytest.raises(ValueError, match="evaluation 'run' is being written by another run"),
    ):
        evaluate_concepts(targets, eval_key="run")
    assert evaluate_concepts(targets, eval_key="run").custom_metrics


def test_lock_documents_of_deleted_datasets_are_removed(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import field_locks, load_concept_benchmark

    deleted = load_concept_benchmark(limit=2, dataset_name="deleted")
    interrupted = run(deleted)
    next(interrupted)
    interrupted.close()
    assert field_locks._collection().count_documents({"dataset": deleted._doc.id}) == 1
    identifier = deleted._doc.id
    deleted.delete()
    list(run(make_dataset(2)))
    assert field_locks._collection().count_documents({"dataset": identifier}) == 0
