"""Measure the overhead of the FiftyOne loop over `model.segment`, and whether its memory grows.

python benchmarks/fiftyone_loop.py                       # 1,000 synthetic images of 112 pixels
python benchmarks/fiftyone_loop.py --samples 200 --router full_reasoning
python benchmarks/fiftyone_loop.py --check               # fail above 25 % overhead or if memory grows

Both variants segment the same files in batches of 8 with the embedded checkpoint, alternating every two batches; the
loop also writes masks and labels, and needs MongoDB. Times are CPU seconds of this process on one thread, as wall time
depends on the load of the machine and waiting threads consume CPU time.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import fmean

import psutil

from conceptseg_hf.data.concept_shapes import ConceptShapes
from conceptseg_hf.integrations.fiftyone_app.mongodb import start_mongod

SIZE, BATCH = 112, 8
TURN = 2 * BATCH  # short, so that other load on the machine affects both variants
LIMIT_PERCENT, LIMIT_GROWTH = 25.0, 1.05


def main() -> int:
    """Run both variants, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Overhead of the FiftyOne loop.")
    parser.add_argument("--samples", type=int, default=1000, help="number of images (default: %(default)s)")
    parser.add_argument("--router", default="sam_only", help="router mode (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # runs after MongoDB has been stopped
    bare, segmenting, loop, memory = measure(folder, arguments.samples, arguments.router)
    overhead = 100 * (loop / segmenting - 1)
    quarter = -(-len(memory) // 4)
    first, last = (fmean(values) for values in (memory[:quarter], memory[-quarter:]))
    print(
        f"{arguments.samples} images; router {arguments.router}, {SIZE} pixels, batches of {BATCH}, CPU seconds:"
    )
    print(f"  model.segment                    {segmenting:7.1f}")
    print(f"  reading + model.segment          {bare:7.1f}")
    print(f"  FiftyOne loop                    {loop:7.1f}")
    print(f"  loop over model.segment          {overhead:6.1f} %")
    print(f"  loop over reading + segment      {100 * (loop / bare - 1):6.1f} %")
    print(
        f"  resident memory                  {first:7.0f} MiB in the first quarter, {last:.0f} MiB in the last"
    )
    return int(arguments.check and (overhead > LIMIT_PERCENT or last > LIMIT_GROWTH * first))


def measure(folder: Path, count: int, router: str) -> tuple[float, float, float, list[float]]:
    """Segment the same files with the model alone and with the loop.

    Returns:
        CPU seconds of reading and segmenting, CPU seconds of `model.segment` in it, CPU seconds of the loop, and the
        memory in MiB after each turn.
    """
    os.environ |= {
        "FIFTYONE_DATABASE_URI": start_mongod(folder / "database"),
        "FIFTYONE_DATABASE_VALIDATION": "false",
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_DEFAULT_DATASET_DIR": str(folder / "data"),
        "FIFTYONE_SHOW_PROGRESS_BARS": "false",
    }
    import fiftyone as fo
    import torch

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection

    torch.set_num_threads(1)
    paths = []
    for index, sample in enumerate(ConceptShapes("test", length=count, size=SIZE)):
        paths.append(str(folder / f"{index:04d}.png"))
        sample.image.save(paths[-1])
    dataset = fo.Dataset("overhead")
    dataset.add_samples([fo.Sample(filepath=path) for path in paths])
    pipeline, prompt = get_pipeline(), "striped star"
    model, processor = pipeline.model, pipeline.processor
    job = SegmentationJob(prompt=prompt, router=router, batch_size=BATCH)
    spent = {"bare": 0.0, "segmenting": 0.0, "loop": 0.0}

    def segment_alone(turn_paths: list[str]) -> None:
        turn_start = time.process_time()
        for start in range(0, len(turn_paths), BATCH):
            batch = [processor.prepare(path, prompt, lazy=True) for path in turn_paths[start : start + BATCH]]
            segment_start = time.process_time()
            model.segment(batch, processor=processor, router=router)
            spent["segmenting"] += time.process_time() - segment_start
        spent["bare"] += time.process_time() - turn_start

    run = segment_collection(dataset, job)

    def segment_in_loop(batches: int) -> None:
        turn_start = time.process_time()
        for _ in range(batches):
            next(run)
        spent["loop"] += time.process_time() - turn_start

    segment_alone(paths[: 4 * BATCH])  # warm-up
    next(run)  # loads the model and declares the fields
    segment_in_loop(4)
    spent.update(dict.fromkeys(spent, 0.0))
    process, memory = psutil.Process(), []
    for start in range(4 * BATCH, count, TURN):
        turn_paths = paths[start : start + TURN]
        segment_alone(turn_paths)
        segment_in_loop(-(-len(turn_paths) // BATCH))
        memory.append(process.memory_info().rss / 2**20)
    return spent["bare"], spent["segmenting"], spent["loop"], memory


if __name__ == "__main__":
    raise SystemExit(main())
