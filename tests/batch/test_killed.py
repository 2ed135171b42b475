"""Jobs that are killed with SIGKILL while they run, under both engines, and workers that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import conceptseg_hf
from conceptseg_hf.batch import run_batch

from .conftest import content

ROOT = Path(conceptseg_hf.__file__).parents[1]
SCRIPT = Path(__file__).with_name("batch_process.py")
BATCHES = 20
# Each kill costs a start: seconds for the local engine, half a minute for Ray.
KILLS = int(os.environ.get("CONCEPTSEG_KILLS", 2))

pytestmark = pytest.mark.slow


class Process:
    """The job of batch_process.py."""

    def __init__(self, images: Path, folder: Path, engine: str, workers: int, concept: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        self.out = folder / "out"
        self._arguments = [str(images), str(self.out), engine, str(workers), str(concept), str(self.log)]

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, str(SCRIPT), *self._arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def segmented(self) -> int:
        """Number of batches that were segmented so far, by all runs."""
        return self.log.read_text().count("\n")

    def kill_after(self, batches: int, delay: float) -> None:
        """Start the job and kill it soon after it has segmented a number of batches more."""
        target = self.segmented() + batches
        process = self.start()
        while self.segmented() < target:
            if process.poll() is not None:
                raise AssertionError(process.stderr.read())
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert process.returncode == -9

    def finish(self) -> int:
        """Run the job to its end and return the number of images that this run computed."""
        process = self.start()
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return int(stdout)


@pytest.fixture()
def start(make_images, make_job, concept, tmp_path):
    """Create a process, and return it with the files of an undisturbed run in this process."""

    def create(engine: str, workers: int) -> tuple[Process, dict[str, bytes]]:
        images = make_images(3 * BATCHES - 1, damaged=(4, 31))
        run_batch(make_job(images), tmp_path / "whole")
        path = concept.save(tmp_path / "concept.safetensors")
        return Process(images, tmp_path, engine, workers, path), content(tmp_path / "whole")

    return create


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        ("local", 0),
        pytest.param("ray", 2, marks=pytest.mark.heavy),
    ],
)
def test_killed_several_times(start, engine, workers):
    if engine == "ray":
        pytest.importorskip("ray", reason="the engine 'ray' needs ray")
    process, whole = start(engine, workers)
    rng = random.Random(0)
    for _ in range(KILLS):
        process.kill_after(rng.randint(1, 3), rng.uniform(0, 0.1))
    assert process.finish() > 0
    assert content(process.out) == whole
    lost = process.segmented() - BATCHES
    assert 0 <= lost <= KILLS * max(workers, 1), "one batch per kill and worker"


@pytest.mark.heavy
def test_one_ray_worker_that_is_killed_equals_two(start):
    """Ray starts the worker again, and repeats what it was working on."""
    pytest.importorskip("ray", reason="the engine 'ray' needs ray")
    process, whole = start("ray", 1)
    running = process.start()
    while process.segmented() < 3:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    worker = int(process.log.read_text().split()[0])
    assert worker != running.pid
    os.kill(worker, signal.SIGKILL)
    stdout, stderr = running.communicate()
    assert running.returncode == 0, stderr
    # Ray prints its own lines about the worker.
    assert int(stdout.split()[-1]) == 3 * BATCHES - 1 and content(process.out) == whole
    assert BATCHES <= process.segmented() <= BATCHES + 1
    assert len(set(process.log.read_text().split())) == 2, "processes"
