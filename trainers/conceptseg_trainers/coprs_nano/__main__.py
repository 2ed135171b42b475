"""Train coprs-nano: `python -m conceptseg_trainers.coprs_nano [--stage prior|checkpoint|base|all]`.

The stage "prior" starts from the VLM and the vision backbone of nano and trains the whole model with supervision;
"checkpoint" writes and measures the checkpoint. With `--photos FOLDER`, both start from mini and use photographs.
"base", which is not part of "all", trains a model that points at a random object in some task families, from nano-base:
it is the start of `grpo_effect`. All stages resume where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conceptseg_hf import ConceptSegForSegmentation
from conceptseg_hf.loading import find_checkpoint

from ..from_scratch.command import make_parser, run_command, scaled
from ..from_scratch.loop import TrainingState, train
from ..nano.base import TRAINING, nano_base_checkpoint
from ..nano.vlm_data import RANDOM_CHOICE_FAMILIES
from .photographs import PhotosPriorData, write_photos_report
from .report import write_checkpoint, write_report
from .settings import STEPS, held_out_count, schedule_of
from .stage import PriorData, PriorExamples, PriorSettings, PriorStage, build_model
from .tokenizers import build_photos_processor, build_processor

_STAGES = ("prior", "checkpoint", "base")
_BASE = "base"


def main() -> None:
    """Run the stages that are given on the command line."""
    parser = make_parser(__package__ or "", __doc__.splitlines()[0], Path("runs/coprs-nano"), _STAGES)
    parser.add_argument(
        "--start",
        help="checkpoint that the training starts from (default: the embedded nano; mini with --photos, nano-base for "
        "the stage base)",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="FOLDER",
        help="folder of the benchmark photos: train a model for photographs from mini instead",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=300,
        help="number of held-out samples per set in the report, without --photos (default: %(default)s)",
    )
    run_command(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    is_base = arguments.stage == _BASE
    if is_base and arguments.photos:
        raise ValueError("--stage base: its task families are those of ConceptShapes; omit --photos.")
    seed, photos = arguments.seed, arguments.photos
    processor = build_photos_processor() if photos else build_processor()
    if is_base and not arguments.start and not nano_base_checkpoint().is_dir():
        raise FileNotFoundError(f"--stage base: {str(nano_base_checkpoint())!r} is missing; {TRAINING}.")
    default_start = nano_base_checkpoint() if is_base else "mini" if photos else "nano"
    start_folder = find_checkpoint(arguments.start or default_start)
    start = ConceptSegForSegmentation.from_pretrained(start_folder)
    model = build_model(start, processor, seed)
    steps, held_out = scaled(STEPS, arguments.scale), held_out_count(arguments.scale)
    settings = PriorSettings(random_choice_families=RANDOM_CHOICE_FAMILIES if is_base else frozenset())
    data: PriorExamples = (
        PhotosPriorData(photos, steps, processor, max(1, held_out // 15), seed)
        if photos
        else PriorData(steps, processor, held_out, seed, settings)
    )
    stage = PriorStage(
        model,
        processor,
        data,
        steps,
        arguments.device,
        seed,
        settings,
        _BASE if is_base else "prior",
    )
    schedule = schedule_of(steps)
    if arguments.stage != "checkpoint":
        train(stage, schedule, arguments.run_dir)
    if is_base:
        write_checkpoint(stage.model, arguments.output_dir or arguments.run_dir / "base-checkpoint")
    elif arguments.stage != "prior":
        TrainingState(
            stage.module, schedule, arguments.run_dir / stage.name / "state.safetensors"
        ).load_average()
        folder = arguments.output_dir or arguments.run_dir / "checkpoint"
        write_checkpoint(stage.model, folder)
        if photos:
            write_photos_report(folder, start_folder, photos, arguments.run_dir)
        else:
            write_report(folder, arguments.run_dir, arguments.samples)


if __name__ == "__main__":
    main()
