"""Measure what the trainers change on mini: `python -m conceptseg_trainers.mini.effects --root PHOTOS`.

Each arm continues the training of mini on the train split of `photos`, and is compared with it on the same test
samples, with paired bootstrap intervals: stage I (`ConceptSFTTrainer`), stage II (`MetaGRPOTrainer`), and stage II with
random rewards as a control. If the command is run again, finished arms are not repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, mini_checkpoint
from conceptseg_hf.data import ConceptSample, FileBenchmark, load_benchmark
from conceptseg_hf.writing import write_file

from ..experiments.arms import Arm
from ..experiments.command import (
    experiment_parser,
    introduction,
    parse_experiment,
    report_interruption,
    run_arms,
    train_settings,
)
from ..experiments.measuring import DECODING, Values, measured_values, values_of
from ..experiments.reinforcement import train_by_reinforcement
from ..experiments.run_folder import check_settings, complete_folder, write_log
from ..experiments.settings import TrainSettings
from ..experiments.tables import comparison_table, families_table
from ..from_scratch.assemble import write_checkpoint
from ..sft_config import ConceptSFTConfig
from ..sft_trainer import ConceptSFTTrainer
from .leaks import training_benchmark

START = "start"
_REWARDS = ("format", "mask", "meta")
ARMS = {
    "sft": Arm("stage I (ConceptSFTTrainer)", supervised=True),
    "meta": Arm("stage II (MetaGRPOTrainer)", _REWARDS),
    "random": Arm("stage II, random rewards (control)", _REWARDS, random_rewards=True),
}
_SOURCE = "photographs"
_SFT_BATCH, _SFT_RATE = 32, 1e-4

Results = dict[str, list[dict[str, Values]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment.

    Returns:
        The exit code: 0; 130 after Ctrl-C.
    """
    parser = experiment_parser(
        f"python -m {__package__}.effects",
        "Measure what stage I and stage II change on mini.",
        mini_checkpoint(),
        Path("runs/mini/effects"),
        ARMS,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the benchmark photos")
    arguments = parse_experiment(parser, argv, "train one with `make mini`")
    settings = train_settings(arguments, learning_rate=2e-4)
    folder: Path = arguments.output_dir
    try:
        check_settings(folder, settings, arguments.start, arguments.samples)
        samples = list(load_benchmark("photos", arguments.root, "test", limit=arguments.samples))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    measured = {_SOURCE: samples}
    greedy = {"greedy": DECODING["greedy"]}
    results: Results = {
        START: [measured_values(arguments.start, measured, values_of, folder / "start.json", greedy)]
    }

    def run_arm(name: str, run_folder: Path, seed: int) -> dict[str, Values]:
        checkpoint = train_arm(ARMS[name], arguments.start, run_folder, settings, seed, arguments.root)
        return measured_values(checkpoint, measured, values_of, run_folder / "values.json", greedy)

    try:
        results |= run_arms(arguments.arms, arguments.seeds, folder, run_arm)
    except KeyboardInterrupt:
        return report_interruption()
    sys.stdout.write(write_report(results, folder / "effects.md", settings, samples))
    return 0


def training_samples(root: Path, count: int, seed: int) -> FileBenchmark:
    """Return training samples of `photos` in random order, without images that leak test images."""
    samples = training_benchmark(root)
    items = samples.items
    order = np.random.default_rng(seed).permutation(len(items))
    samples.items = [items[int(order[i % len(items)])] for i in range(count)]
    return samples


def train_arm(arm: Arm, start: Path, folder: Path, settings: TrainSettings, seed: int, root: Path) -> Path:
    """Train an arm and write its checkpoint; does nothing if the checkpoint exists.

    Args:
        arm: The arm.
        start: Folder of the checkpoint that it starts from.
        folder: Folder of the run; the checkpoint is written to its subfolder "checkpoint".
        settings: How the arm is trained. Stage I has as many steps, of 32 samples.
        seed: Random seed of data and sampling.
        root: Folder of the benchmark `photos`.

    Returns:
        The folder of the checkpoint.
    """
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    start_time = time.process_time()
    torch.manual_seed(seed)
    model = ConceptSegForSegmentation.from_pretrained(start)
    processor = ConceptSegProcessor.from_pretrained(start)
    count = settings.steps * (_SFT_BATCH if arm.supervised else settings.prompts)
    samples = training_samples(root, count, seed)
    if arm.supervised:
        steps = _train_supervised(model, processor, samples, folder, settings, seed)
    else:
        steps = train_by_reinforcement(arm, model, processor, samples, folder, settings, seed)
    write_log(folder, seed, time.process_time() - start_time, steps)
    with complete_folder(checkpoint) as temporary:
        write_checkpoint(model, processor, temporary)
    return checkpoint


def _train_supervised(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    folder: Path,
    settings: TrainSettings,
    seed: int,
) -> list[dict[str, Any]]:
    """Train the CTM with ConceptSFTTrainer on samples, and return the metrics of its steps."""
    args = ConceptSFTConfig(
        str(folder / "run"),
        max_steps=settings.steps,
        per_device_train_batch_size=_SFT_BATCH,
        learning_rate=_SFT_RATE,
        completion_source="generated",
        save_strategy="no",
        report_to=[],
        log_examples=0,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    trainer = ConceptSFTTrainer(model, args, samples, processing_class=processor)
    trainer.train()
    return trainer.state.log_history


def write_report(
    results: Results, path: Path, settings: TrainSettings, samples: Sequence[ConceptSample]
) -> str:
    """Write the tables, all datasets together and by dataset, as Markdown, and return them."""
    titles = {START: START, **{name: arm.title for name, arm in ARMS.items()}}
    source = f"{_SOURCE}, greedy"
    datasets = [f"{sample.level} {sample.dataset}" for sample in samples]
    parts = [
        "# What the trainers change on mini",
        f"Full reasoning on the first {len(samples)} test samples. {introduction(settings)}",
        comparison_table(results, START, titles, source),
        "## Mask IoU by dataset",
        families_table(results, START, titles, source, datasets),
    ]
    report = "\n\n".join(parts) + "\n"
    write_file(path, report)
    return report


if __name__ == "__main__":
    sys.exit(main())
