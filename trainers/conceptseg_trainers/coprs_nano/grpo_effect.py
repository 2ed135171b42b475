"""Measure the effect of GRPO on coprs-nano: `python -m conceptseg_trainers.coprs_nano.grpo_effect`.

The start has headroom: in some task families it was trained to point at a random object (stage "base" of
`conceptseg_trainers.coprs_nano`, which starts from the checkpoint of the stage "base" of nano). Each arm continues from
it, and is compared with it on the same held-out samples, with paired bootstrap intervals. L_SEG (eq. 8) is supervision:
arms without it, and arms with random rewards, separate its effect from that of the policy gradient.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from conceptseg_hf import CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.writing import write_file

from ..coprs_config import CoPRSTrainerConfig
from ..coprs_trainer import CoPRSTrainer
from ..experiments.command import (
    experiment_parser,
    introduction,
    parse_experiment,
    report_interruption,
    run_arms,
    train_settings,
)
from ..experiments.measuring import Values, measured_values
from ..experiments.reinforcement import grpo_arguments, random_reward, run_trainer
from ..experiments.run_folder import check_settings, complete_folder, write_log
from ..experiments.settings import TrainSettings
from ..experiments.tables import comparison_table, mean_over_seeds, paired
from ..nano.evidence.training import evaluation_samples, training_samples
from ..split_reference import split_reference_dataset
from .values import COMPARED, MEASURES, values_of

START = "start"
_SEG_LOSS_WEIGHT = 0.3  # eq. 4


@dataclass(frozen=True)
class Arm:
    """A variant of the training.

    Attributes:
        title: Name of its row in the tables.
        supervised: Whether L_SEG is part of the loss.
        random_rewards: Whether rewards are drawn at random (control) instead of being computed.
    """

    title: str
    supervised: bool
    random_rewards: bool = False


ARMS = {
    "coprs": Arm("GRPO + L_SEG (eq. 4)", supervised=True),
    "grpo": Arm("GRPO alone", supervised=False),
    "seg": Arm("L_SEG, random rewards (control)", supervised=True, random_rewards=True),
    "random": Arm("random rewards (control)", supervised=False, random_rewards=True),
}
_EFFECTS = (("coprs", "seg"), ("grpo", "random"))
"""Pairs of arms that differ in the rewards alone."""

Results = dict[str, list[dict[str, Values]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; finished arms are not repeated.

    Returns:
        The exit code: 0; 130 after Ctrl-C.
    """
    parser = experiment_parser(
        f"python -m {__package__}.grpo_effect",
        "Measure the effect of GRPO on coprs-nano from a start that points at random objects.",
        Path("runs/coprs-nano/base-checkpoint"),
        Path("runs/coprs-nano/grpo-effect"),
        ARMS,
    )
    arguments = parse_experiment(
        parser, argv, "train one with `python -m conceptseg_trainers.coprs_nano --stage base`"
    )
    start: Path = arguments.start
    settings = train_settings(arguments)
    folder: Path = arguments.output_dir
    try:
        samples = evaluation_samples(arguments.samples)
        check_settings(folder, settings, start, arguments.samples)
    except ValueError as error:
        parser.error(str(error))
    try:
        results = run(arguments.arms, arguments.seeds, start, folder, settings, samples)
    except KeyboardInterrupt:
        return report_interruption()
    sys.stdout.write(write_report(results, folder / "grpo_effect.md", settings))
    return 0


def run(
    arms: Sequence[str],
    seeds: Sequence[int],
    start: Path,
    folder: Path,
    settings: TrainSettings,
    samples: Mapping[str, Sequence[ConceptSample]],
) -> Results:
    """Train and measure arms, or read their results if they are finished.

    Args:
        arms: Names of the arms.
        seeds: Random seeds.
        start: Folder of the checkpoint that they start from.
        folder: Folder of the runs.
        settings: How arms are trained.
        samples: Held-out samples by evaluation set.

    Returns:
        The results of the start and of each arm, one per seed.
    """
    results: Results = {START: [measured_values(start, samples, values_of, folder / "start.json")]}

    def run_arm(name: str, run_folder: Path, seed: int) -> dict[str, Values]:
        checkpoint = train_arm(ARMS[name], start, run_folder, settings, seed)
        return measured_values(checkpoint, samples, values_of, run_folder / "values.json")

    return results | run_arms(arms, seeds, folder, run_arm)


def train_arm(arm: Arm, start: Path, folder: Path, settings: TrainSettings, seed: int) -> Path:
    """Train an arm and write its checkpoint; does nothing if the checkpoint exists.

    Args:
        arm: The arm.
        start: Folder of the checkpoint that it starts from.
        folder: Folder of the run; the checkpoint is written to its subfolder "checkpoint".
        settings: How the arm is trained.
        seed: Random seed of data and sampling.

    Returns:
        The folder of the checkpoint.
    """
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    start_time = time.process_time()
    torch.manual_seed(seed)
    model = CoPRSForSegmentation.from_pretrained(start)
    processor = CoPRSProcessor.from_pretrained(start)
    args = CoPRSTrainerConfig(
        str(folder / "run"),
        reward_masks="policy",  # the modules of the start are already trained
        reward_weights=None if arm.random_rewards else [0.7, 0.3],
        seg_loss_weight=_SEG_LOSS_WEIGHT if arm.supervised else 0.0,
        switch_step=0,
        prior_rate=1.0,
        prompt_encoder_rate=1.0,
        mask_decoder_rate=1.0,
        lr_scheduler_kwargs={},
        **grpo_arguments(settings, seed),
    )
    trainer = CoPRSTrainer(
        model,
        reward_funcs=[random_reward(seed)] if arm.random_rewards else None,
        args=args,
        train_dataset=split_reference_dataset(
            training_samples(settings.steps * settings.prompts, seed), processor=processor
        ),
        processing_class=processor,
    )
    steps = run_trainer(trainer, f"{folder.parent.name}, seed {seed}")
    write_log(folder, seed, time.process_time() - start_time, steps)
    with complete_folder(checkpoint) as temporary:
        trainer.save_model(str(temporary))
    return checkpoint


def write_report(results: Results, path: Path, settings: TrainSettings) -> str:
    """Write the tables of all evaluation sets as Markdown, and return them."""
    titles = {START: START, **{name: arm.title for name, arm in ARMS.items()}}
    parts = [
        "# GRPO on coprs-nano from a start that points at random objects",
        introduction(settings),
    ]
    for source in results[START][0]:
        parts += [f"## {source}", comparison_table(results, START, titles, source, MEASURES, COMPARED)]
        if effects := _effects(results, source):
            parts.append("\n".join(effects))
    report = "\n\n".join(parts) + "\n"
    write_file(path, report)
    return report


def _effects(results: Results, source: str) -> list[str]:
    """Return the differences of the arms that differ in the rewards alone."""
    lines = []
    for arm, control in _EFFECTS:
        if arm not in results or control not in results:
            continue
        for measure in COMPARED:
            values, reference = (
                mean_over_seeds([run[source][measure] for run in results[name]]) for name in (arm, control)
            )
            interval = paired(values, reference, f"{arm}/{control}/{source}/{measure}")
            if interval is not None:
                lines.append(
                    f"- {measure}: {ARMS[arm].title} - {ARMS[control].title}: {interval_text(interval, 3, signed=True)}"
                )
    return lines


if __name__ == "__main__":
    sys.exit(main())
