"""The command line of experiments that train arms with several seeds from one checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..from_scratch.command import require_checkpoint
from .measuring import Values
from .settings import TrainSettings, describe


def experiment_parser(
    prog: str, description: str, start: Path, output_dir: Path, arms: Iterable[str]
) -> argparse.ArgumentParser:
    """Return a parser with the options of all experiments.

    Args:
        prog: Name of the command.
        description: First sentence of the help.
        start: Default checkpoint that the arms start from.
        output_dir: Default folder of runs and tables.
        arms: Names of the arms.
    """
    names = list(arms)
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--start",
        type=Path,
        default=start,
        help="checkpoint that the arms start from (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=output_dir,
        help="folder of runs and tables (default: %(default)s)",
    )
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="arms to run (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds (default: 0 1 2)"
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {TrainSettings.steps})")
    parser.add_argument(
        "--samples", type=int, default=300, help="samples per evaluation set (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's default)")
    return parser


def parse_experiment(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, remedy: str
) -> argparse.Namespace:
    """Parse and check the options, without repeated arms and seeds, and set the number of CPU threads.

    Args:
        parser: Parser of `experiment_parser`.
        argv: The options; those of the process by default.
        remedy: How to train the start, for the error if it is missing.

    Raises:
        SystemExit: If an option is invalid.
    """
    arguments = parser.parse_args(argv)
    require_checkpoint(parser, arguments.start, remedy, "--start ")
    if min(arguments.samples, 1 if arguments.steps is None else arguments.steps) < 1:
        parser.error("--samples or --steps is below 1; use at least 1.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.arms = list(dict.fromkeys(arguments.arms))
    arguments.seeds = list(dict.fromkeys(arguments.seeds))
    return arguments


def train_settings(arguments: argparse.Namespace, **settings: Any) -> TrainSettings:
    """Return the settings of an experiment, with the number of steps of its command line if there is one."""
    if arguments.steps:
        settings["steps"] = arguments.steps
    return TrainSettings(**settings)


def run_arms(
    arms: Iterable[str],
    seeds: Sequence[int],
    folder: Path,
    run_arm: Callable[[str, Path, int], dict[str, Values]],
) -> dict[str, list[dict[str, Values]]]:
    """Run each arm with each seed.

    Args:
        arms: Names of the arms.
        seeds: Random seeds.
        folder: Folder of the runs.
        run_arm: Function from the name of an arm, the folder of its run and a seed to the measured values.

    Returns:
        The results of each arm, one per seed.
    """
    return {name: [run_arm(name, folder / name / f"seed_{seed}", seed) for seed in seeds] for name in arms}


def report_interruption() -> int:
    """Say how an experiment that was stopped by Ctrl-C continues, and return the exit code."""
    sys.stderr.write("stopped; run the same command to continue with the first unfinished arm.\n")
    return 130


def introduction(settings: TrainSettings) -> str:
    """Return the sentences on settings and statistics that introduce the tables."""
    return (
        f"{settings.completions} completions per run ({describe(settings)}). Values are means over samples and seeds. "
        "Differences are paired by sample, with 95 % bootstrap intervals over samples."
    )
