"""Train coprs-nano: `python -m conceptseg_trainers.coprs_nano [--stage prior|grpo|checkpoint|all]`.

The stage "prior" starts from the VLM and the vision backbone of nano and trains the whole model with supervision. All
stages resume where they were interrupted.
"""

from __future__ import annotations

from pathlib import Path

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint

from ..from_scratch.command import make_parser, run_command, scaled
from ..from_scratch.loop import Schedule, train
from .report import write_report
from .stage import PriorStage, build_model
from .tokenizers import build_processor

_STAGES = ("prior", "checkpoint")
STEPS = 2500
HELD_OUT = 120


def main() -> None:
    """Run the stages that are given on the command line."""
    parser = make_parser(__package__ or "", __doc__.splitlines()[0], _STAGES, Path("runs/coprs-nano"))
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


def _run(arguments) -> None:  # type: ignore[no-untyped-def]  # argparse.Namespace
    processor = build_processor()
    start = ConceptSegForSegmentation.from_pretrained(arguments.start)
    model = build_model(start, processor)
    steps = scaled(STEPS, arguments.scale)
    stage = PriorStage(
        model,
        processor,
        steps,
        arguments.device,
        max(12, round(HELD_OUT * min(1.0, arguments.scale))),
        arguments.seed,
    )
    schedule = Schedule(
        steps, learning_rate=1e-3, warmup=200, decay=0.5, evaluate_every=500, save_every=25, ema=0.998
    )
    if arguments.stage in ("prior", "all"):
        train(stage, schedule, arguments.run_dir)
    if arguments.stage in ("checkpoint", "all"):
        folder = arguments.output_dir or arguments.run_dir / "checkpoint"
        write_report(stage, schedule, arguments.run_dir, folder, arguments.samples)


if __name__ == "__main__":
    main()
