"""Measure user-visible latencies: imports, `--help`, sample generation, and both routes of the embedded checkpoint.

    make bench
    python benchmarks/speed.py --check    # fail if a limit is exceeded

Each value is the median of several runs on one thread, so that machines can be compared. The tests count calls and
modules instead, as times depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

# The torchvision shim is run from its file, so that the package itself is not imported.
IMPORT_BASELINE = (
    "import pathlib, runpy, importlib.util as u;"
    "root = pathlib.Path(u.find_spec('conceptseg_hf').submodule_search_locations[0]);"
    "runpy.run_path(str(root / '_compat.py'))['declare_operators']();"
    "import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl, transformers.models.sam3.modeling_sam3"
)
HELP = "import sys, conceptseg_launcher; sys.argv[1:] = ['--help']; conceptseg_launcher.main()"

Row = tuple[str, float, str, float | None]
"""Name, value, unit, and limit (maximum of a time, minimum of a rate)."""


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of an action."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fresh_python(*arguments: str) -> Callable[[], object]:
    """Return an action that runs a new interpreter."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Run the benchmarks, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description="Measure user-visible latencies.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    arguments = parser.parse_args()
    num_exceeded = 0
    for name, value, unit, limit in (*startup_rows(), *parts_rows(), *route_rows()):
        exceeded = limit is not None and (value > limit if unit == "s" else value < limit)
        num_exceeded += exceeded
        remark = "" if limit is None else f"  ({'exceeds ' if exceeded else ''}limit {limit:g})"
        print(f"{name:<44} {value:8.2f} {unit}{remark}")
    return int(arguments.check and num_exceeded > 0)


def startup_rows() -> list[Row]:
    """Measure imports and `--help` in new processes."""
    baseline = median_seconds(fresh_python("-c", IMPORT_BASELINE), 5)
    package = median_seconds(fresh_python("-c", "import conceptseg_hf"), 5)
    return [
        ("import conceptseg_hf", package, "s", baseline + 0.3),
        ("  only Qwen2.5-VL and SAM 3 of Transformers", baseline, "s", None),
        ("conceptseg --help", median_seconds(fresh_python("-c", HELP), 5), "s", 1.0),
    ]


def parts_rows() -> list[Row]:
    """Measure functions with potentially expensive inputs."""
    import numpy as np
    from PIL import Image

    from conceptseg_hf import parse_completion
    from conceptseg_hf.data import ConceptShapes
    from conceptseg_hf.data.concept_shapes.benchmark import family_at
    from conceptseg_hf.visualization import overlay

    shapes = ConceptShapes("train")
    without_references = [
        index
        for index in range(240)
        if family_at(index)[2].__name__ in ("absent", "extreme_size", "relation")
    ]
    nested = "<think>" * 150_000
    image, mask = Image.new("RGB", (4000, 3000)), np.ones((3000, 4000), dtype=bool)
    return [
        (
            "ConceptShapes",
            240 / median_seconds(lambda: [shapes[i] for i in range(240)], 3),
            "samples/s",
            None,
        ),
        (
            "ConceptShapes, without references",
            len(without_references) / median_seconds(lambda: [shapes[i] for i in without_references], 3),
            "samples/s",
            500.0,
        ),
        ("parsing a completion of 1 MB", median_seconds(lambda: parse_completion(nested, 100), 3), "s", 2.0),
        ("overlay of 4000 x 3000 pixels", median_seconds(lambda: overlay(image, mask), 3), "s", 10.0),
    ]


def route_rows() -> list[Row]:
    """Measure both routes of the embedded checkpoint."""
    import torch

    torch.set_num_threads(1)
    from conceptseg_hf.data import load_benchmark
    from conceptseg_hf.evaluation.records import segment_samples
    from conceptseg_hf.loading import load_model_and_processor

    benchmark = load_benchmark("concept-shapes", split="train")
    model, processor = load_model_and_processor()
    samples = [benchmark[i] for i in range(24)]
    rows: list[Row] = []
    for router in ("sam_only", "full_reasoning", "adaptive"):
        for batch in (1, 8):

            def run(router: str = router, batch: int = batch) -> None:
                for start in range(0, len(samples), batch):
                    segment_samples(model, processor, samples[start : start + batch], router=router)

            rate = len(samples) / median_seconds(run, 3)
            rows.append((f"segment, {router}, batch {batch}", rate, "images/s", None))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
