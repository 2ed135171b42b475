"""Runs the experiments: `python -m conceptseg_trainers.nano.evidence [--quick]`.

Trains every arm with every seed from the base checkpoint, evaluates all on the same held-out samples, and writes
`evidence.md` with paired bootstrap intervals. Arms that are finished are not repeated, so a run can be interrupted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from conceptseg_hf.progress import print_line
from conceptseg_hf.writing import write_file

from .arms import ARMS, Arm
from .measuring import DECODING, Values, measure
from .tables import comparison_table, format_interval, paired
from .training import TrainSettings, describe, evaluation_samples, train_arm

START = "start"
_QUICK = TrainSettings(steps=12)


def main(argv: list[str] | None = None) -> int:
    """Runs the experiments.

    Returns:
        The exit code: 0; 1 if `--quick` shows no gain whose interval excludes zero.
    """
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano.evidence", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--start",
        type=Path,
        default=Path("runs/nano/base-checkpoint"),
        help="base checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/evidence"),
        help="runs and tables (default: %(default)s)",
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {TrainSettings.steps})")
    parser.add_argument(
        "--samples", type=int, default=300, help="samples per evaluation set (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--quick", action="store_true", help="Meta-GRPO alone, one seed, in about ten minutes"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.start / "config.json").is_file():
        parser.error(
            f"--start {str(arguments.start)!r} is no checkpoint; train it with `--stage base` of nano."
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = _QUICK if arguments.quick else TrainSettings()
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    arms = {name: ARMS[name] for name in (["meta"] if arguments.quick else arguments.arms)}
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    folder = arguments.output_dir / ("quick" if arguments.quick else "full")
    results = run(arms, seeds, arguments.start, folder, settings, arguments.samples)
    report = write_report(results, folder / "evidence.md", settings, arguments.start)
    sys.stdout.write(report)
    if not arguments.quick:
        return 0
    source = "trained families, greedy"
    gain = paired(results["meta"][0][source]["mask_iou"], results[START][0][source]["mask_iou"], "quick")
    return int(gain is None or gain.low <= 0)


def run(
    arms: dict[str, Arm], seeds: list[int], start: Path, folder: Path, settings: TrainSettings, count: int
) -> dict[str, list[dict[str, Values]]]:
    """Trains and measures the arms; the start is measured under the key "start"."""
    samples = evaluation_samples(count)
    results = {START: [measure(start, samples, "concept+text", True, folder / "start.json")]}
    for name, arm in arms.items():
        results[name] = []
        for seed in seeds:
            run_folder = folder / name / f"seed_{seed}"
            checkpoint = train_arm(arm, start, run_folder, settings, seed)
            values = measure(
                checkpoint, samples, arm.prompted_by, arm.meta_reasoning, run_folder / "values.json"
            )
            results[name].append(values)
            source = "trained families, greedy"
            gain = paired(values[source]["mask_iou"], results[START][0][source]["mask_iou"], f"{name}/{seed}")
            if gain is not None:
                print_line(
                    f"{name}, seed {seed}: mask IoU {format_interval(gain)} over the start", sys.stdout
                )
    return results


def write_report(
    results: dict[str, list[dict[str, Values]]], path: Path, settings: TrainSettings, start: Path
) -> str:
    """Writes the tables of all evaluation sets, and returns them."""
    titles = {START: "start", **{name: arm.title for name, arm in ARMS.items()}}
    sources = list(results[START][0])
    parts = [
        "# Stage II on nano-base",
        (
            f"Start: {start.name}. {settings.completions} completions per run ({describe(settings)}). Differences are "
            "paired by sample and averaged over seeds, with 95 % bootstrap intervals over samples."
        ),
    ]
    for source in sources:
        parts += [f"## {source}", comparison_table(results, START, titles, source)]
    report = "\n\n".join(parts) + "\n"
    write_file(path, report)
    return report


__all__ = ["DECODING", "main", "run", "write_report"]

if __name__ == "__main__":
    sys.exit(main())
