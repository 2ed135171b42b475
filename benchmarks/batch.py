"""Measures a batch job on many images: memory and time per part of the job, and the images per second of each route.

    python benchmarks/batch.py                  # 10,000 images by a concept, and 200 by reasoning

The images are 48 scenes of ConceptShapes under many names. Memory is the resident set of the process. Times are CPU
seconds of the process and its threads, because other programs may run on the machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from conceptseg_hf import ConceptPrompt, Reference
from conceptseg_hf.batch import BatchJob, BatchResult, open_images, run_batch
from conceptseg_hf.concept_prompt import concept_hash
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.progress import hide_bars_in_pipes

SCENES, PARTS = 48, 10


def write_images(folder: Path, samples: list[ConceptSample], count: int) -> None:
    """Write the scenes once, and link them under `count` names."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:06d}.png"
        if number < len(samples):
            samples[number].image.save(path)
        else:
            path.hardlink_to(folder / f"{number % len(samples):06d}.png")


class Meter:
    """Memory and CPU time after each part of a job.

    Args:
        count: Number of images.
        batch_size: Images per batch.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self._process, self._batch_size = psutil.Process(), batch_size
        self._every = max(count // PARTS, batch_size)
        self._images = self._measured = 0
        self._seconds = time.process_time()
        self.rows: list[tuple[int, float, float]] = []

    def __call__(self, result: BatchResult) -> None:
        """Count a batch."""
        self._images += self._batch_size
        if self._images - self._measured >= self._every:
            now = time.process_time()
            memory = self._process.memory_info().rss / 1e6
            self.rows.append(
                (self._images, memory, 1000 * (now - self._seconds) / (self._images - self._measured))
            )
            self._measured, self._seconds = self._images, now


def main() -> None:
    """Runs the jobs and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--reasoning-images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    hide_bars_in_pipes()
    shapes = ConceptShapes("test", size=128)
    family = [index for index in range(len(shapes)) if shapes.slot(index).family.__name__ == "shadow"]
    samples = [shapes[index] for index in family[:SCENES]]
    model, _ = load_model_and_processor()
    concept = ConceptPrompt("shadow", ("shadow",), score=1.0, threshold=0.0, model_hash=concept_hash(model))
    references = [Reference(sample.image, mask=sample.mask) for sample in samples[-4:]]
    del model

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", samples, arguments.images)
        write_images(root / "few", samples, arguments.reasoning_images)
        jobs = {
            "concept": BatchJob(
                open_images(root / "images"),
                concept=concept,
                router="sam_only",
                batch_size=arguments.batch_size,
            ),
            "reasoning": BatchJob(
                open_images(root / "few"),
                prompt="shadow",
                references=references,
                router="full_reasoning",
                batch_size=arguments.batch_size,
            ),
        }
        seconds = {}
        for name, job in jobs.items():
            meter = Meter(len(job.images), job.batch_size)
            start = time.process_time()
            report = run_batch(job, root / name, on_batch=meter)
            seconds[name] = (time.process_time() - start) / report.images
            print(
                f"\n{name}: {report.images} images\n| images | memory (MB) | CPU-s per 1,000 images |\n|---|---|---|"
            )
            for images, memory, cost in meter.rows:
                print(f"| {images} | {memory:.0f} | {cost:.1f} |")
            last = meter.rows[1:] if len(meter.rows) > 2 else meter.rows  # the first part loads the model
            slope = np.polyfit([row[0] for row in last], [row[1] for row in last], 1)[0]
            print(f"memory: {1000 * slope:+.2f} MB per 1,000 images after the first part")
    print(f"\nCPU seconds per image, reasoning / concept: {seconds['reasoning'] / seconds['concept']:.2f}")


if __name__ == "__main__":
    main()
