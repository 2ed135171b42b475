"""Times what a user waits for: imports, the command's help, making samples, and both routes on the embedded checkpoint.

    make bench

Each figure is the median of several runs on whatever the machine is doing; one thread, so that machines compare.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

# The shim for torchvision, taken from its file, so that the package itself is not imported.
IMPORT_BASELINE = (
    "import pathlib, runpy, importlib.util as u;"
    "root = pathlib.Path(u.find_spec('conceptseg_hf').submodule_search_locations[0]);"
    "runpy.run_path(str(root / '_compat.py'))['declare_operators']();"
    "import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl, transformers.models.sam3.modeling_sam3"
)


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median wall time of an action."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fresh_python(*words: str) -> Callable[[], object]:
    """An action that runs a new interpreter."""
    return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Prints the table."""
    baseline = median_seconds(fresh_python("-c", IMPORT_BASELINE), 5)
    rows = [
        ("import conceptseg_hf", median_seconds(fresh_python("-c", "import conceptseg_hf"), 5), "s"),
        ("  Transformers' Qwen2.5-VL and SAM 3 alone", baseline, "s"),
        (
            "conceptseg --help",
            median_seconds(
                fresh_python(
                    "-c",
                    "import sys, conceptseg_launcher; sys.argv[1:] = ['--help']; conceptseg_launcher.main()",
                ),
                5,
            ),
            "s",
        ),
    ]

    import torch

    torch.set_num_threads(1)
    from conceptseg_hf.data import load_benchmark
    from conceptseg_hf.evaluation.loading import load_model_and_processor
    from conceptseg_hf.evaluation.records import segment_samples

    benchmark = load_benchmark("concept-shapes", split="train")
    rows.append(
        ("ConceptShapes", 240 / median_seconds(lambda: [benchmark[i] for i in range(240)], 3), "samples/s")
    )
    model, processor = load_model_and_processor()
    samples = [benchmark[i] for i in range(24)]
    for router in ("sam_only", "full_reasoning", "adaptive"):
        for batch in (1, 8):

            def run(router: str = router, batch: int = batch) -> None:
                for start in range(0, len(samples), batch):
                    segment_samples(model, processor, samples[start : start + batch], router=router)

            rows.append(
                (f"segment, {router}, batch {batch}", len(samples) / median_seconds(run, 3), "images/s")
            )
    for name, value, unit in rows:
        print(f"{name:<44} {value:8.2f} {unit}")


if __name__ == "__main__":
    main()
