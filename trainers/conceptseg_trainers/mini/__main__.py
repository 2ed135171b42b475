"""Train conceptseg-mini: `python -m conceptseg_trainers.mini --root PHOTOS [--stage sam|vlm|ctm|all]`.

Stages resume where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.presets import MINI_IMAGE_SIZE

from ..from_scratch.assemble import load_stages, load_start, write_checkpoint
from ..from_scratch.command import common_options, make_parser, run_command, run_in_parallel, scaled
from ..from_scratch.ctm_stage import CtmStage, CtmSteps
from ..from_scratch.loop import Schedule, Stage, train
from ..from_scratch.sam_stage import SamStage, SamWithHeads
from ..from_scratch.vlm_stage import VlmStage, VlmWithHeads
from .ctm_data import PhotosCtmData
from .dense import DenseHeads
from .sam_data import PhotosSamData, make_heads
from .tokenizers import mini_processor
from .vlm_data import PhotosVlmData

_STAGES = ("sam", "vlm", "ctm")
_PRETRAINING = {"sam": 5000, "vlm": 4000}  # number of steps in which only the vision tower is trained
_STEPS = {"sam": 6000, "vlm": 8000}
# Moves the most probable number from a border with a fifth of the boxes to the median.
_DISTANCE_WEIGHT = 40.0
_LEARNING_RATES = {"sam": 8e-4, "vlm": 1.2e-3}


def main() -> None:
    """Run the stages that are given on the command line."""
    description = f"Train conceptseg-mini on photographs of {MINI_IMAGE_SIZE} pixels."
    parser = make_parser(__package__ or "", description, Path("runs/mini"), _STAGES)
    parser.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder of the benchmark photos, with one dataset in each subfolder",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint whose training is continued, without pretraining of the vision towers; another --seed gives "
        "other images than its training",
    )
    run_command(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.stage == "all":
        run_in_parallel(__package__ or "", ["sam", "vlm"], arguments.threads, common_options(arguments))
        arguments.stage = "ctm"
    if arguments.stage == "ctm":
        _run_ctm_stage(arguments)
    else:
        stage, schedule = make_stage(arguments.stage, arguments)
        train(stage, schedule, arguments.run_dir)


def _run_ctm_stage(arguments: argparse.Namespace) -> None:
    scale = min(1.0, arguments.scale)
    processor = mini_processor()
    model = load_stages("mini", processor, arguments.run_dir)
    if arguments.start:
        load_start(model.ctm, arguments.start, "ctm")
    steps = CtmSteps.scaled(scale)
    stage = CtmStage(
        model,
        processor,
        PhotosCtmData(arguments.root),
        arguments.run_dir,
        steps,
        tasks=scaled(6000, scale, 24),
        images=8,
        device=arguments.device,
        held_out=scaled(160, scale, 8),
        seed=arguments.seed,
    )
    train(stage, steps.schedule(), arguments.run_dir)
    write_checkpoint(
        model.cpu(), processor, arguments.output_dir or arguments.run_dir / "checkpoint", half=True
    )


def make_stage(name: str, arguments: argparse.Namespace) -> tuple[Stage, Schedule]:
    """Return the stage "sam" or "vlm" for the options of the command, and its schedule."""
    device, seed, scale = arguments.device, arguments.seed, arguments.scale
    pretraining = 0 if arguments.start else scaled(_PRETRAINING[name], scale, 4)
    steps = scaled(_STEPS[name], scale, 8)
    config, processor = ConceptSegConfig.from_preset("mini"), mini_processor()
    torch.manual_seed(seed)
    stage: Stage
    if name == "sam":
        held_out = scaled(24, min(1.0, scale), 2)
        sam_data = PhotosSamData(arguments.root, images=12, held_out=held_out, seed=seed)
        sam = SamWithHeads(config.sam_config, make_heads)
        stage = SamStage(sam, sam_data, processor, pretraining, device, seed, mask_size=MINI_IMAGE_SIZE // 2)
    else:
        vlm_data = PhotosVlmData(arguments.root, steps, held_out=scaled(8, min(1.0, scale), 1), seed=seed)
        vlm = VlmWithHeads(config.vlm_config, DenseHeads)
        stage = VlmStage(
            vlm,
            vlm_data,
            processor,
            pretraining,
            steps,
            device=device,
            distance_weight=_DISTANCE_WEIGHT,
        )
    if arguments.start:  # after the stage has initialized weights
        load_start(getattr(stage.module, name), arguments.start, name)
    schedule = Schedule(pretraining + steps, _LEARNING_RATES[name], restart=pretraining, evaluate_every=500)
    return stage, schedule


if __name__ == "__main__":
    main()
