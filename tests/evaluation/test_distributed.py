"""Tests that distributed, interrupted and resumed evaluations give the same results as a single run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conceptseg_hf import nano_checkpoint
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.distributed import Processes, join_processes
from conceptseg_hf.evaluation.records import RECORD_FIELDS
from conceptseg_hf.evaluation.records.store import RecordStore
from conceptseg_hf.evaluation.running import evaluator
from conceptseg_hf.loading import load_model_and_processor

SCRIPT = Path(__file__).with_name("evaluation_process.py")
WRITTEN = ("records.jsonl", "report.json", "report.md")
needs_nano = pytest.mark.skipif(
    not (nano_checkpoint() / "config.json").is_file(), reason="there is no embedded checkpoint"
)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "conceptseg_hf.cli", "evaluate", *options]


@pytest.fixture()
def run_two(run_two_processes) -> Callable[..., list[dict]]:
    """Run `conceptseg evaluate` in two processes and return the note of each process."""

    def run(folder: Path, *options: str) -> list[dict]:
        notes = folder / "notes"
        notes.mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = run_two_processes(str(SCRIPT), str(notes), *options, env=environment)
        assert result.returncode == 0, result.stderr[-20000:]
        assert result.stdout.count("foreground IoU: ") == 1, "only the main process prints"
        assert "\r" not in result.stderr, "no progress bars without a terminal"
        return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(2)]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WRITTEN}


@needs_nano
@pytest.mark.slow
@pytest.mark.heavy
def test_two_processes_give_the_same_results_as_one(run_two, tmp_path):
    options = ("--limit", "29", "--batch-size", "4", "--metrics", "miou,giou,ciou,mae,ber,mdice")
    model, processor = load_model_and_processor(device="cpu")
    expected = tmp_path / "expected"
    evaluate(model, "concept-shapes", processor=processor, limit=29, batch_size=4, output_dir=expected)

    shared = tmp_path / "shared"
    notes = run_two(tmp_path / "a", *options, "--output-dir", str(shared))
    assert [note["world_size"] for note in notes] == [2, 2]
    assert sorted(note["samples"] for note in notes) == [13, 16], (
        "four batches of 4, and three batches of 4 with one batch of 1"
    )
    assert not any(note["joined"] for note in notes)
    assert contents(shared) == contents(expected)

    # One process runs three batches and one sample of the fourth; two processes run the fourth batch and the rest.
    resumed = tmp_path / "resumed"
    evaluate(model, "concept-shapes", processor=processor, limit=13, batch_size=4, output_dir=resumed)
    notes = run_two(tmp_path / "b", *options, "--output-dir", str(resumed))
    assert sum(note["samples"] for note in notes) == 17
    assert contents(resumed) == contents(expected)


@needs_nano
@pytest.mark.slow
def test_resumes_after_sigkill(tmp_path, monkeypatch):
    """The resumed run repeats at most one batch and ends with the same files."""
    batch, limit = 8, 200
    model, processor = load_model_and_processor(device="cpu")
    options = {"processor": processor, "limit": limit, "batch_size": batch, "router": "sam_only"}
    evaluate(model, "concept-shapes", output_dir=tmp_path / "expected", **options)

    killed = tmp_path / "killed"
    arguments = (
        "--limit",
        str(limit),
        "--batch-size",
        str(batch),
        "--router",
        "sam_only",
        "--output-dir",
        str(killed),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, env=environment) as process:
        records = killed / "records.jsonl"
        while not records.exists() or records.read_bytes().count(b"\n") < limit // 3:
            assert process.poll() is None, "the process ended before it was killed"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    count = records.read_bytes().count(b"\n")
    assert limit // 3 <= count < limit
    assert not (killed / "report.md").exists()

    segmented = []
    segment_samples = evaluator.segment_samples

    def counting(*arguments):
        segmented.append(len(arguments[2]))
        return segment_samples(*arguments)

    monkeypatch.setattr(evaluator, "segment_samples", counting)
    evaluate(model, "concept-shapes", output_dir=killed, **options)
    assert limit - count <= sum(segmented) <= limit - count + batch
    assert contents(killed) == contents(tmp_path / "expected")


def test_partly_written_batch_is_run_again(model, processor, tmp_path, monkeypatch):
    options = {"processor": processor, "limit": 7, "batch_size": 3, "router": "sam_only"}
    evaluate(model, "concept-shapes", output_dir=tmp_path / "expected", **options)
    evaluate(model, "concept-shapes", output_dir=tmp_path / "cut", **options)
    path = tmp_path / "cut" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:50])
    segmented = []
    segment_samples = evaluator.segment_samples

    def counting(*arguments):
        segmented.append([sample.sample_id for sample in arguments[2]])
        return segment_samples(*arguments)

    monkeypatch.setattr(evaluator, "segment_samples", counting)
    evaluate(model, "concept-shapes", output_dir=tmp_path / "cut", **options)
    assert segmented == [[f"test-00000{i}" for i in (3, 4, 5)], ["test-000006"]]
    assert contents(tmp_path / "cut") == contents(tmp_path / "expected")


def a_line(index, record) -> str:
    return json.dumps({"index": index, **record}) + "\n"


def test_files_of_killed_processes_are_merged(tmp_path, record_like):
    with RecordStore(tmp_path, {"a": 1}) as store:
        store.add([(0, record_like(label="zero"))])
    # Two processes were killed, one of them during a write; their records are newer than the merged ones.
    lines = [a_line(0, record_like(label="new")), a_line(4, record_like(label="four"))]
    (tmp_path / "records.0.jsonl").write_text("".join(lines))
    (tmp_path / "records.1.jsonl").write_text(
        a_line(2, record_like(label="two")) + a_line(3, record_like())[:99]
    )
    with RecordStore(tmp_path, {"a": 1}) as store:
        assert [index in store for index in range(5)] == [True, False, True, False, True]
        assert [store[index]["label"] for index in (0, 2, 4)] == ["new", "two", "four"]
        store.add([(3, record_like(label="three")), (1, record_like(label="one"))])
        store.finish()
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl", "settings.json"]


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "[1, 2]", "7", "null", "{}"),
        *(f'{{"index": {index}}}' for index in ("3", "999", "-1", '"x"', "null", "true", "[1]")),
    ],
)
def test_invalid_lines_are_dropped(tmp_path, record_like, line):
    with RecordStore(tmp_path, {}) as store:
        store.add([(3, record_like())])
    path = tmp_path / "records.jsonl"
    before = path.read_text()
    path.write_text(before + line + "\n")
    with RecordStore(tmp_path, {}, total=4) as store:
        assert store[3] == record_like()
        store.finish()
    assert path.read_text() == before


@pytest.mark.parametrize("change", [{"index": -1}, {"index": True}, {"index": "x"}, {"scores": 3}])
def test_records_with_invalid_fields_are_dropped(tmp_path, record_like, change):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text(json.dumps({"index": 0, **record_like()} | change) + "\n")
    with RecordStore(tmp_path, {}) as store:
        assert 0 not in store and 1 not in store
    assert (tmp_path / "records.jsonl").read_text() == ""


@pytest.mark.parametrize("text", ["[]", "{", "7", ""])
def test_invalid_settings_file_raises(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"settings\.json' does not hold the settings of a run; give another"
    ):
        RecordStore(tmp_path, {})
    assert (tmp_path / "settings.json").read_text() == text


def test_records_have_all_required_fields(record_like):
    assert record_like().keys() == RECORD_FIELDS


def test_records_without_settings_raise_and_are_kept(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match=r"records without settings\.json"):
        RecordStore(tmp_path, {})
    assert (tmp_path / "records.jsonl").read_text() == '{"index": 0}\n'


def test_several_processes_require_a_folder():
    with pytest.raises(ValueError, match="give an output_dir"):
        RecordStore(None, {}, Processes(0, 2))


def test_processes_without_a_shared_folder_raise(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "join_processes", lambda: Processes(0, 2))
    options = {"processor": processor, "limit": 5, "batch_size": 2, "router": "sam_only"}
    with pytest.raises(ValueError, match="2 of 5 records, made by other processes, are missing"):
        evaluate(model, "concept-shapes", output_dir=tmp_path, **options)
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 3, "existing records must be kept"
    monkeypatch.undo()
    evaluate(model, "concept-shapes", output_dir=tmp_path, **options)
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 5


def test_process_without_a_launcher_runs_alone(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes = join_processes()
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    processes.barrier()
    processes.leave()
