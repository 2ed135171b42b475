"""Train conceptseg-nano: `python -m conceptseg_trainers.nano [--stage sam|vlm|ctm|all|...]`.

The stages "sam" and "vlm" are independent of each other. "all" runs them in two parallel processes, then "ctm", which
needs both and writes the checkpoint. "base" trains a VLM that chooses random objects in some task families,
"base-referring" teaches it to locate what their rules refer to, in another form, and "base-ctm" trains its CTM: this is
the start of reinforcement learning in `evidence`. All stages resume where they were interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from conceptseg_hf.configuration_conceptseg import ConceptSegConfig

from ..from_scratch.assemble import load_average, load_stages, write_checkpoint
from ..from_scratch.command import common_options, make_parser, run_command, run_in_parallel, scaled
from ..from_scratch.ctm_stage import CtmStage, CtmSteps
from ..from_scratch.loop import Schedule, Stage, train
from ..from_scratch.sam_stage import SamStage, SamWithHeads
from .ctm_data import ShapesCtmData
from .sam_data import ShapesSamData, make_heads
from .tokenizers import build_processor
from .vlm_data import RANDOM_CHOICE_FAMILIES, make_referring_stage, make_stage

_STAGES = ("sam", "vlm", "ctm", "base", "base-referring", "base-ctm")
PRESETS = {"qwen2_5_vl": "nano", "qwen3_vl": "nano-qwen3"}
"""Presets by the family of the VLM."""
PRETRAINING = {"sam": 4000, "vlm": 5000}  # number of steps in which only the vision tower is trained
STEPS = {"sam": 11_000, "vlm": 12_000, "base": 6_000, "base-referring": 2_000}
HELD_OUT = {"sam": 180, "vlm": 132, "ctm": 240}


def main() -> None:
    """Run the stages that are given on the command line."""
    parser = make_parser(__package__ or "", __doc__.splitlines()[0], Path("runs/nano"), _STAGES)
    parser.add_argument(
        "--family",
        choices=list(PRESETS),
        default="qwen2_5_vl",
        help="family of the VLM (default: %(default)s)",
    )
    parser.add_argument(
        "--sam",
        type=Path,
        metavar="CHECKPOINT",
        help="use the SAM 3 of this nano checkpoint, which does not depend on the VLM, instead of the stage sam",
    )
    run_command(parser, _run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.stage == "all":
        stages = ["vlm"] if arguments.sam else ["sam", "vlm"]
        run_in_parallel(__package__ or "", stages, arguments.threads, common_options(arguments))
        arguments.stage = "ctm"
    _run_stage(arguments)


def _run_stage(arguments: argparse.Namespace) -> None:
    if arguments.stage in ("ctm", "base-ctm"):
        _run_ctm_stage(arguments)
        return
    kind = "sam" if arguments.stage == "sam" else "vlm"
    pretraining = scaled(PRETRAINING[kind], arguments.scale, 4)
    steps = scaled(STEPS[arguments.stage], arguments.scale, 8)
    held_out, device, seed = _held_out(kind, arguments.scale), arguments.device, arguments.seed
    stage: Stage
    if arguments.stage == "base-referring":
        referring = make_referring_stage(steps, device, held_out, seed, PRESETS[arguments.family])
        load_average(referring.module, arguments.run_dir, "base")
        train(referring, Schedule(steps, learning_rate=1e-3, decay=0.4), arguments.run_dir)
        return
    if kind == "sam":
        torch.manual_seed(seed)
        module = SamWithHeads(ConceptSegConfig.from_preset("nano").sam_config, make_heads)
        data = ShapesSamData(held_out=held_out, seed=seed)
        stage = SamStage(module, data, build_processor(), pretraining, device, seed)
        learning_rate = 1e-3
    else:
        is_base = arguments.stage == "base"
        families = RANDOM_CHOICE_FAMILIES if is_base else frozenset()
        preset = PRESETS[arguments.family]
        stage = make_stage(pretraining, steps, families, arguments.stage, device, held_out, seed, preset)
        learning_rate = 1.5e-3
    schedule = Schedule(pretraining + steps, learning_rate, restart=pretraining, evaluate_every=500)
    train(stage, schedule, arguments.run_dir)


def _run_ctm_stage(arguments: argparse.Namespace) -> None:
    is_base = arguments.stage == "base-ctm"
    run_dir, scale = arguments.run_dir, min(1.0, arguments.scale)
    processor = build_processor(arguments.family)
    vlm_stage = "base-referring" if is_base else "vlm"
    model = load_stages(PRESETS[arguments.family], processor, run_dir, vlm_stage, arguments.sam)
    folder = run_dir / "base-referring" if is_base else run_dir
    steps = CtmSteps.scaled(scale)
    stage = CtmStage(
        model,
        processor,
        ShapesCtmData(),
        folder,
        steps,
        tasks=scaled(9600, scale, 48),
        device=arguments.device,
        held_out=_held_out("ctm", scale),
        seed=arguments.seed,
    )
    train(stage, steps.schedule(), folder)
    output_dir = run_dir / ("base-checkpoint" if is_base else "checkpoint")
    write_checkpoint(model.cpu(), processor, arguments.output_dir or output_dir, half=is_base)


def _held_out(kind: str, scale: float) -> int:
    """Return the number of held-out samples of a stage."""
    return scaled(HELD_OUT[kind], min(1.0, scale), 24)


if __name__ == "__main__":
    main()
