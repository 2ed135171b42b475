"""Compare the runtime of the weighted F-measure with PySODMetrics, and measure the cost per image, at 600 x 600.

    python benchmarks/metrics.py          needs conceptseg-hf[eval]

Both implementations are timed alternately in one run; compare the ratio rather than the absolute times.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

SIDE, TURNS = 600, 15


def seconds(*actions: Callable[[], object]) -> list[float]:
    """Return the median wall time of each action; the actions run alternately."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(TURNS):
        for action, spent in zip(actions, times):
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def main() -> None:
    """Run the benchmark and print the table."""
    import numpy as np
    from py_sod_metrics import WeightedFmeasure

    from conceptseg_hf.evaluation import MaskMetrics
    from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS
    from conceptseg_hf.evaluation.metrics.weighted_f import weighted_f_measure

    y, x = np.mgrid[:SIDE, :SIDE]
    ground_truth = np.hypot(y - 300, x - 280) < 130
    distance = 120 - np.hypot(y - 290, x - 300)
    predictions = {
        "a mask": distance > 0,
        "probabilities, 0 in background": np.clip(0.5 + distance / 60, 0, 1),
        "probabilities, no zeros": np.clip(0.5 + distance / 60, 0.001, 1),
    }
    print(f"weighted F-measure of a disk of radius 130 at {SIDE} x {SIDE}, milliseconds:")
    for name, prediction in predictions.items():
        library = WeightedFmeasure(beta=1)
        library_time, our_time = seconds(
            lambda: library.cal_wfm(prediction.astype(np.float64), ground_truth),  # noqa: B023 (called immediately)
            lambda: weighted_f_measure(prediction, ground_truth),  # noqa: B023
        )
        difference = abs(
            library.cal_wfm(prediction.astype(np.float64), ground_truth)
            - weighted_f_measure(prediction, ground_truth)
        )
        print(
            f"  {name:30} PySODMetrics {1e3 * library_time:6.1f}   ours {1e3 * our_time:6.1f}   "
            f"ratio {library_time / our_time:4.1f}   difference {difference:.0e}"
        )
    print("scoring one image, milliseconds:")
    for label, metrics in (("default metrics", METRICS), ("all metrics", (*METRICS, *LIBRARY_METRICS))):
        (spent,) = seconds(lambda: MaskMetrics(metrics=metrics).update(predictions["a mask"], ground_truth))  # noqa: B023
        print(f"  {label:30} {1e3 * spent:6.1f}")


if __name__ == "__main__":
    main()
