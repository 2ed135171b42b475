"""Run the experiments: `python -m conceptseg_trainers.nano.evidence [--quick]`.

Trains each arm with each seed from the base checkpoint, evaluates all of them on the same held-out samples, and writes
`evidence.md` with paired bootstrap intervals. If the command is run again, finished arms are not repeated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.progress import print_line
from conceptseg_hf.writing import write_file

from ...experiments.arms import Arm
from ...experiments.command import (
    experiment_parser,
    introduction,
    parse_experiment,
    report_interruption,
    run_arms,
    train_settings,
)
from ...experiments.measuring import Values, measure
from ...experiments.run_folder import TRAINING_LOG, check_settings
from ...experiments.settings import TrainSettings
from ...experiments.tables import comparison_table, families_table, paired
from ..base import TRAINING, nano_base_checkpoint
from .arms import ARMS, COMPARED_ARMS
from .tables import pairs_table, runs_table
from .training import evaluation_samples, train_arm

START = "start"
MAIN_SOURCE = "trained families, greedy"
_QUICK_STEPS = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments.

    Returns:
        The exit code: 0; 1 if `--quick` shows no gain whose interval excludes zero; 130 after Ctrl-C.
    """
    parser = experiment_parser(
        "python -m conceptseg_trainers.nano.evidence",
        "Train variants of stage II from the base checkpoint of nano, and compare them.",
        nano_base_checkpoint(),
        Path("runs/evidence"),
        ARMS,
    )
    parser.add_argument(
        "--quick", action="store_true", help="run Meta-GRPO only, with one seed, in about ten minutes"
    )
    arguments = parse_experiment(parser, argv, TRAINING)
    start: Path = arguments.start
    settings = train_settings(arguments, steps=_QUICK_STEPS if arguments.quick else TrainSettings.steps)
    arms = {name: ARMS[name] for name in (["meta"] if arguments.quick else arguments.arms)}
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    folder = arguments.output_dir / ("quick" if arguments.quick else "full")
    try:
        samples = evaluation_samples(arguments.samples)
        check_settings(folder, settings, start, arguments.samples)
    except ValueError as error:
        parser.error(str(error))
    try:
        results = run(arms, seeds, start, folder, settings, samples)
    except KeyboardInterrupt:
        return report_interruption()
    sys.stdout.write(
        write_report(
            results, read_logs(arms, seeds, folder), folder / "evidence.md", settings, start, samples
        )
    )
    if not arguments.quick:
        return 0
    gain = paired(
        results["meta"][0][MAIN_SOURCE]["mask_iou"], results[START][0][MAIN_SOURCE]["mask_iou"], "quick"
    )
    return int(gain is None or gain.low <= 0)


def run(
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    start: Path,
    folder: Path,
    settings: TrainSettings,
    samples: Mapping[str, Sequence[ConceptSample]],
) -> dict[str, list[dict[str, Values]]]:
    """Train and evaluate arms, or read their results if they are finished.

    Args:
        arms: The arms by name.
        seeds: Random seeds.
        start: Folder of the base checkpoint.
        folder: Folder of the runs.
        settings: How arms are trained.
        samples: Held-out samples by evaluation set.

    Returns:
        For each arm, the results of `measure` of its seeds. The keys "start", "start-box" (the box prompts SAM 3) and
        "sam-only" (the user's prompt does) contain those of the base checkpoint.
    """
    start_values = measure(start, samples, "concept+text", True, folder / "start.json")
    results = {
        "sam-only": [measure(start, samples, "text", True, folder / "sam-only.json", router="sam_only")],
        "start-box": [measure(start, samples, "box", True, folder / "start-box.json")],
        START: [start_values],
    }

    def run_arm(name: str, run_folder: Path, seed: int) -> dict[str, Values]:
        arm = arms[name]
        checkpoint = train_arm(arm, start, run_folder, settings, seed)
        values = measure(checkpoint, samples, arm.prompted_by, arm.meta_reasoning, run_folder / "values.json")
        gain = paired(
            values[MAIN_SOURCE]["mask_iou"], start_values[MAIN_SOURCE]["mask_iou"], f"{name}/{seed}"
        )
        if gain is not None:
            print_line(
                f"{name}, seed {seed}: mask IoU minus that of the start: "
                f"{interval_text(gain, 3, signed=True)}",
                sys.stdout,
            )
        return values

    return results | run_arms(arms, seeds, folder, run_arm)


def read_logs(arms: Iterable[str], seeds: Sequence[int], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the logs of finished trainings, for each arm one per seed; see `train_arm`."""
    return {
        name: [
            json.loads((folder / name / f"seed_{seed}" / TRAINING_LOG).read_text(encoding="utf-8"))
            for seed in seeds
        ]
        for name in arms
    }


def write_report(
    results: Mapping[str, Sequence[Mapping[str, Values]]],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    settings: TrainSettings,
    start: Path,
    samples: Mapping[str, Sequence[ConceptSample]],
) -> str:
    """Write the tables of all evaluation sets as Markdown, and return them."""
    untrained = {"sam-only": "SAM 3 only", "start-box": "start, box prompt", START: "start"}
    titles = {**untrained, **{name: arm.title for name, arm in ARMS.items()}}
    parts = [
        "# Stage II on nano-base",
        f"Start: {start.name}. {introduction(settings)}",
    ]
    for source in results[START][0]:
        parts += [f"## {source}", comparison_table(results, START, titles, source)]
        if any(results.get(arm) and results.get(baseline) for arm, baseline in COMPARED_ARMS):
            parts.append(pairs_table(results, COMPARED_ARMS, titles, source))
    main_set, _ = MAIN_SOURCE.split(", ")
    families = [str(sample.family) for sample in samples[main_set]]
    parts += [
        "## Mask IoU by family",
        f"Evaluation: {MAIN_SOURCE}.",
        families_table(results, START, titles, MAIN_SOURCE, families, left_out="hidden_rule"),
    ]
    parts += ["## Runs", f"Evaluation: {MAIN_SOURCE}.", runs_table(results, logs, START, titles, MAIN_SOURCE)]
    report = "\n\n".join(parts) + "\n"
    write_file(path, report)
    return report


if __name__ == "__main__":
    sys.exit(main())
