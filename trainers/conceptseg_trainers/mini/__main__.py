"""Train conceptseg-mini: `python -m conceptseg_trainers.mini --root PHOTOS [--stage sam|all]`.

Stages resume where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.presets import MINI_IMAGE_SIZE

from ..from_scratch.command import make_parser, run_command, scaled
from ..from_scratch.loop import Schedule, train
from ..from_scratch.sam_stage import SamStage, SamWithHeads
from .sam_data import PhotosSamData, make_heads
from .tokenizers import mini_processor

_STAGES = ("sam",)
_PRETRAINING = {"sam": 5000}  # number of steps in which only the vision tower is trained
_STEPS = {"sam": 6000}
_LEARNING_RATES = {"sam": 8e-4}


def main() -> None:
    """Run the stages that are given on the command line."""
    description = f"Train conceptseg-mini on photographs of {MINI_IMAGE_SIZE} pixels."
    parser = make_parser(__package__ or "", description, _STAGES, Path("runs/mini"))
    parser.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder of the benchmark photos, with one dataset in each subfolder",
    )
    run_command(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    for stage in _STAGES if arguments.stage == "all" else (arguments.stage,):
        _run_stage(stage, arguments)


def _run_stage(name: str, arguments: argparse.Namespace) -> None:
    device, seed, scale = arguments.device, arguments.seed, arguments.scale
    pretraining, steps = scaled(_PRETRAINING[name], scale), scaled(_STEPS[name], scale)
    torch.manual_seed(seed)
    module = SamWithHeads(ConceptSegConfig.from_preset("mini").sam_config, make_heads)
    data = PhotosSamData(arguments.root, images=12, held_out=scaled(24, min(1.0, scale), 2), seed=seed)
    stage = SamStage(module, data, mini_processor(), pretraining, device, seed, bfloat16=True)
    schedule = Schedule(pretraining + steps, _LEARNING_RATES[name], restart=pretraining, evaluate_every=500)
    train(stage, schedule, arguments.run_dir)


if __name__ == "__main__":
    main()
