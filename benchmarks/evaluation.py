"""Measure the fraction of evaluation time that is spent on metrics: embedded checkpoint, ConceptShapes at 600 x 600.

    python benchmarks/evaluation.py [SAMPLES]          needs conceptseg-hf[eval]

The embedded checkpoint is the worst case: larger models take longer, but the metrics do not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image

SIDE = 600


class Enlarged(Sequence):
    """Samples of a benchmark with enlarged targets."""

    def __init__(self, samples: Sequence, count: int) -> None:
        self._samples, self._count = samples, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> object:
        sample = self._samples[index]
        factor = SIDE / sample.image.width
        return replace(
            sample,
            image=sample.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC),
            mask=sample.mask.resize((SIDE, SIDE), Image.Resampling.NEAREST),
            box=None if sample.box is None else tuple(factor * side for side in sample.box),
        )


def main() -> None:
    """Run the benchmark and print the table."""
    import torch

    torch.set_num_threads(1)
    from conceptseg_hf.data import load_benchmark
    from conceptseg_hf.evaluation import MaskMetrics, evaluate
    from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS
    from conceptseg_hf.loading import load_model_and_processor

    spent = 0.0
    update = MaskMetrics.update

    def timed(self: MaskMetrics, *args: object, **kwargs: object) -> dict[str, float]:
        nonlocal spent
        start = time.perf_counter()
        try:
            return update(self, *args, **kwargs)
        finally:
            spent += time.perf_counter() - start

    MaskMetrics.update = timed  # type: ignore[method-assign]
    samples = Enlarged(load_benchmark("concept-shapes"), int(sys.argv[1]) if len(sys.argv) > 1 else 48)
    model, processor = load_model_and_processor()
    evaluate(model, samples, processor=processor, limit=8)  # warm-up
    print(f"{len(samples)} samples at {SIDE} x {SIDE}, batches of 8, one thread:")
    print(f"{'protocol':9} {'metrics':8} {'router':15} {'ms/sample':>9} {'metrics ms':>10} {'fraction':>8}")
    for protocol in ("standard", "paper"):
        for label, metrics in (("default", METRICS), ("all", (*METRICS, *LIBRARY_METRICS))):
            for router in ("sam_only", "adaptive", "full_reasoning"):
                spent, start = 0.0, time.perf_counter()
                evaluate(
                    model, samples, processor=processor, protocol=protocol, metrics=metrics, router=router
                )
                total = time.perf_counter() - start
                per_sample, metric = (1e3 * seconds / len(samples) for seconds in (total, spent))
                print(
                    f"{protocol:9} {label:8} {router:15} {per_sample:9.1f} {metric:10.1f} {spent / total:8.1%}"
                )


if __name__ == "__main__":
    main()
