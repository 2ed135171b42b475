"""Tables of the pairs of arms that differ in one component, and of single runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conceptseg_hf.evaluation.reporting.tables import interval_text

from ...experiments.measuring import MEASURES, Values
from ...experiments.tables import mean_over_seeds, paired, plain_table


def pairs_table(
    results: Mapping[str, Sequence[Mapping[str, Values]]],
    pairs: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
    source: str,
) -> str:
    """Format a Markdown table with one row per pair of arms: differences of their means over seeds.

    Args:
        results: For each arm, the results of `measure` of its seeds.
        pairs: The arms to compare, and their baselines; pairs without results are omitted.
        titles: The arms' titles.
        source: Evaluation set and decoding, a key of the results.
    """
    rows = []
    for arm, baseline in pairs:
        if not (results.get(arm) and results.get(baseline)):
            continue
        cells = [f"{titles[arm]} - {titles[baseline]}"]
        for name in MEASURES:
            values, reference = (
                mean_over_seeds([run[source][name] for run in results[each]]) for each in (arm, baseline)
            )
            interval = paired(values, reference, f"{arm}/{baseline}/{source}/{name}")
            cells.append(interval_text(interval, 3, signed=True))
        rows.append(cells)
    return plain_table(["difference", *MEASURES], rows)


def runs_table(
    results: Mapping[str, Sequence[Mapping[str, Values]]],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    baseline: str,
    titles: Mapping[str, str],
    source: str,
) -> str:
    """Format a Markdown table with one row per run: its difference from the baseline, CPU time and entropy.

    Args:
        results: For each arm, the results of `measure` of its seeds.
        logs: For each arm, the logs of `train_arm` of its seeds.
        baseline: The arm that the others are compared with; it has one run.
        titles: The arms' titles.
        source: Evaluation set and decoding, a key of the results.
    """
    heading = ["arm", "seed", f"mask IoU - {titles[baseline]}", "CPU minutes"]
    heading.append("entropy of tokens, first and last step")
    rows = []
    reference = results[baseline][0][source]["mask_iou"]
    for arm, arm_logs in logs.items():
        for run, log in zip(results[arm], arm_logs, strict=True):
            interval = paired(run[source]["mask_iou"], reference, f"{arm}/{log['seed']}/{source}")
            entropies = [step["entropy"] for step in log["steps"] if "entropy" in step]
            cells = [
                titles[arm],
                str(log["seed"]),
                interval_text(interval, 3, signed=True),
                f"{log['cpu_seconds'] / 60:.1f}",
                f"{entropies[0]:.2f}, {entropies[-1]:.2f}" if entropies else "-",
            ]
            rows.append(cells)
    return plain_table(heading, rows)
