"""Train coprs-nano: `python -m conceptseg_trainers.coprs_nano [--stage prior|checkpoint|base|all]`.

The stage "prior" starts from the VLM and the vision backbone of nano and trains the whole model with supervision;
"checkpoint" writes and measures the checkpoint. "base", which is not part of "all", trains a model that points at a
random object in some task families, from the checkpoint of nano's stage "base-ctm": it is the start of `grpo_effect`.
All stages resume where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint

from ..from_scratch.command import make_parser, run_command, scaled
from ..from_scratch.loop import train
from ..nano.vlm_data import RANDOM_CHOICE_FAMILIES
from .report import write_checkpoint, write_report
from .settings import HELD_OUT, STEPS, schedule_of
from .stage import PriorSettings, PriorStage, build_model
from .tokenizers import build_processor

_STAGES = ("prior", "checkpoint", "base")
_BASE = "base"


def main() -> None:
    """Run the stages that are given on the command line."""
    parser = make_parser(__package__ or "", __doc__.splitlines()[0], Path("runs/coprs-nano"), _STAGES)
    parser.add_argument(
        "--start",
        type=Path,
        default=nano_checkpoint(),
        help="nano checkpoint that the training starts from (default: the embedded one)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=300,
        help="number of held-out samples per set in the report (default: %(default)s)",
    )
    run_command(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    is_base = arguments.stage == _BASE
    processor = build_processor()
    start = ConceptSegForSegmentation.from_pretrained(arguments.start)
    model = build_model(start, processor, arguments.seed)
    steps = scaled(STEPS, arguments.scale)
    stage = PriorStage(
        model,
        processor,
        steps,
        arguments.device,
        max(12, round(HELD_OUT * min(1.0, arguments.scale))),
        arguments.seed,
        PriorSettings(random_choice_families=RANDOM_CHOICE_FAMILIES) if is_base else None,
        _BASE if is_base else "prior",
    )
    schedule = schedule_of(steps)
    if arguments.stage != "checkpoint":
        train(stage, schedule, arguments.run_dir)
    if is_base:
        write_checkpoint(stage.model, arguments.output_dir or arguments.run_dir / "base-checkpoint")
    elif arguments.stage != "prior":
        folder = arguments.output_dir or arguments.run_dir / "checkpoint"
        write_report(stage, schedule, arguments.run_dir, folder, arguments.samples)


if __name__ == "__main__":
    main()
