"""What the FiftyOne loop adds to bare `model.segment`, and whether its memory grows.

python benchmarks/fiftyone_loop.py                       # 1,000 drawn pictures of 112 pixels
python benchmarks/fiftyone_loop.py --samples 200 --router full_reasoning

Both read the same files and segment batches of 8 with the embedded checkpoint; the loop also writes masks and labels
and needs MongoDB. Times are of this process (CPU seconds), as a busy machine stretches others.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import psutil

from conceptseg_hf.data.concept_shapes import ConceptShapes
from conceptseg_hf.integrations.mongodb import start_mongod

SIZE, BATCH = 112, 8


def main() -> None:
    """Measures both and prints the figures."""
    parser = argparse.ArgumentParser(description="Overhead of the FiftyOne loop.")
    parser.add_argument("--samples", type=int, default=1000, help="pictures (default: %(default)s)")
    parser.add_argument("--router", default="sam_only", help="router mode (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.samples, arguments.router)


def measure(folder: Path, count: int, router: str) -> None:
    """Segments the same files with the model alone, then through the loop."""
    os.environ |= {
        "FIFTYONE_DATABASE_URI": start_mongod(folder / "database"),
        "FIFTYONE_DATABASE_VALIDATION": "false",
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_DEFAULT_DATASET_DIR": str(folder / "data"),
        "FIFTYONE_SHOW_PROGRESS_BARS": "false",
    }
    import fiftyone as fo

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection
    from conceptseg_hf.processing_conceptseg import ConceptSegInputs

    paths = []
    for index, sample in enumerate(ConceptShapes("test", length=count, size=SIZE)):
        paths.append(str(folder / f"{index:04d}.png"))
        sample.image.save(paths[-1])
    dataset = fo.Dataset("overhead")
    dataset.add_samples([fo.Sample(filepath=path) for path in paths])
    pipeline, prompt = get_pipeline(), "striped star"
    model, processor = pipeline.model, pipeline.processor

    def segment_alone(chosen: list[str]) -> float:
        seconds = 0.0
        for start in range(0, len(chosen), BATCH):
            batch = [processor.prepare(path, prompt, lazy=True) for path in chosen[start : start + BATCH]]
            begun = time.process_time()
            model.segment(ConceptSegInputs(batch, processor), router=router)
            seconds += time.process_time() - begun
        return seconds

    segment_alone(paths[: 4 * BATCH])  # warm
    begun = time.process_time()
    segment_seconds = segment_alone(paths)
    bare_seconds = time.process_time() - begun
    process = psutil.Process()
    begun = time.process_time()
    job = SegmentationJob(prompt=prompt, router=router, batch_size=BATCH)
    memory = [process.memory_info().rss / 2**20 for _ in segment_collection(dataset, job)]
    loop_seconds = time.process_time() - begun
    print(f"{len(paths)} samples; router {router}, {SIZE} pixels, batches of {BATCH}, CPU seconds:")
    print(f"  model.segment                    {segment_seconds:7.1f}")
    print(f"  reading, preparing, segmenting   {bare_seconds:7.1f}")
    print(f"  the loop                         {loop_seconds:7.1f}")
    print(f"  over model.segment               {100 * (loop_seconds / segment_seconds - 1):6.1f} %")
    print(f"  over reading + model.segment     {100 * (loop_seconds / bare_seconds - 1):6.1f} %")
    tenth = len(memory) // 10
    shown = ", ".join(f"{value:.0f}" for value in itertools.islice(memory, tenth, None, max(1, 2 * tenth)))
    print(f"  resident memory in MiB on the way: {shown}")


if __name__ == "__main__":
    main()
