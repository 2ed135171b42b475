"""Train the CTM of nano with several seeds and numbers of concept tokens (L2, Figure 7 of the paper), and compare them.

`python -m conceptseg_trainers.nano.evidence.ctm_runs --run-dir runs/nano` needs the stages "sam", "vlm" and "ctm" of
nano. All runs use its VLM, its SAM 3 and its completions; only the CTM differs. If the command is run again, finished
runs are not repeated and an interrupted one resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conceptseg_hf.writing import write_file

from ...from_scratch.assemble import load_stages, write_checkpoint
from ...from_scratch.ctm_stage import CtmStage, CtmSteps
from ...from_scratch.loop import train
from ..ctm_data import ShapesCtmData
from ..tokenizers import build_processor
from . import concept_tokens

DEFAULT_TOKENS = 8
_TOKENS = (1, 2, 4, 16)
_SEEDS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure all runs, and write a table for each number of concept tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano.evidence.ctm_runs",
        description="Train the CTM of nano with several seeds and numbers of concept tokens.",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs/nano"), help="folder of the stages (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(_SEEDS), help="with 8 concept tokens (default: 0 1 2)"
    )
    parser.add_argument(
        "--tokens",
        nargs="*",
        type=int,
        default=list(_TOKENS),
        help="further numbers of concept tokens, with the first seed (default: 1 2 4 16)",
    )
    parser.add_argument("--samples", type=int, default=300, help="samples per set (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's default)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = {DEFAULT_TOKENS: arguments.seeds} | dict.fromkeys(arguments.tokens, arguments.seeds[:1])
    parts = []
    for count, seeds in sorted(runs.items()):
        checkpoints = [train_ctm(arguments.run_dir, count, seed) for seed in seeds]
        values = [concept_tokens.measure(checkpoint, arguments.samples) for checkpoint in checkpoints]
        parts.append(
            f"## {count} concept tokens, seeds {' '.join(map(str, seeds))}\n\n{concept_tokens.table(values)}"
        )
        write_file(arguments.run_dir / "ctm_runs.md", "\n".join(parts))
    sys.stdout.write("\n".join(parts))


def train_ctm(
    run_dir: Path,
    num_concept_tokens: int,
    seed: int,
    steps: CtmSteps | None = None,
    tasks: int = 9600,
    held_out: int = 240,
) -> Path:
    """Train a CTM and write its checkpoint; does nothing if the checkpoint exists.

    Args:
        run_dir: Folder of the stages of nano.
        num_concept_tokens: Number of concept tokens.
        seed: Random seed of weights and batches.
        steps: Number of steps of each phase.
        tasks: Number of training tasks.
        held_out: Number of samples of each held-out set per evaluation.

    Returns:
        The folder of the checkpoint.
    """
    name = f"ctm-{num_concept_tokens}-tokens-seed-{seed}"
    checkpoint = run_dir / name / "checkpoint"
    if (checkpoint / "config.json").is_file():
        return checkpoint
    steps = steps or CtmSteps()
    processor = build_processor()
    model = load_stages("nano", processor, run_dir, num_concept_tokens=num_concept_tokens, seed=seed)
    stage = CtmStage(
        model, processor, ShapesCtmData(), run_dir, steps, tasks, name=name, held_out=held_out, seed=seed
    )
    train(stage, steps.schedule(), run_dir)
    temporary = checkpoint.with_name("checkpoint.tmp")
    write_checkpoint(model, processor, temporary)
    temporary.rename(checkpoint)  # an existing checkpoint is complete
    return checkpoint


if __name__ == "__main__":
    main()
