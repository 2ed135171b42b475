"""Trains conceptseg-nano: `python -m conceptseg_trainers.nano [--stage sam|vlm|ctm|base|base-ctm|all]`.

The stages "sam" and "vlm" do not depend on each other; "all" runs them side by side in two processes, then "ctm",
which needs both and writes the checkpoint. "base" trains another VLM, which is not shown the correct choice in some
families, and "base-ctm" its CTM: the start of reinforcement learning in `evidence`. Every stage resumes where it was
stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import torch

from .assemble import load_stage, write_checkpoint
from .ctm_stage import CtmStage, CtmSteps
from .loop import Schedule, train
from .sam_stage import SamStage
from .vlm_stage import UNTAUGHT_FAMILIES, VlmStage

PRETRAINING = {"sam": 4000, "vlm": 5000}  # steps in which only the vision tower trains
STEPS = {"sam": 11_000, "vlm": 12_000}
HELD_OUT = {"sam": 180, "vlm": 132, "ctm": 240}


def main() -> None:
    """Runs the stages that the command line asks for; what ends them early is told in one sentence."""
    try:
        _run()
    except (FloatingPointError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last state that was saved.\n")
        sys.exit(130)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--stage",
        choices=["sam", "vlm", "ctm", "base", "base-ctm", "all"],
        default="all",
        help="which stage to run (default: all, which excludes base and base-ctm)",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/nano"),
        help="state, logs and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir", type=Path, help="where the checkpoint goes (default: <run-dir>/checkpoint)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of a stage (default: PyTorch's own)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the steps of every stage (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.stage == "all":
        _run_side_by_side(["sam", "vlm"], arguments)
        arguments.stage = "ctm"
    _run_stage(arguments)


def _run_side_by_side(stages: list[str], arguments: argparse.Namespace) -> None:
    """Runs stages in processes of their own, which share the processors.

    Raises:
        SystemExit: If one fails; the others are stopped, and go on where they were when the command is run again.
    """
    threads = arguments.threads or max(1, torch.get_num_threads() // len(stages))
    command = [
        sys.executable,
        "-m",
        __package__,
        "--threads",
        str(threads),
        "--run-dir",
        str(arguments.run_dir),
    ]
    command += ["--device", arguments.device, "--seed", str(arguments.seed), "--scale", str(arguments.scale)]
    processes = [subprocess.Popen([*command, "--stage", stage]) for stage in stages]
    try:
        for process in processes:
            if process.wait():
                sys.exit(process.returncode)
    finally:
        for process in processes:
            process.terminate()


def _run_stage(arguments: argparse.Namespace) -> None:
    pretraining, steps = (
        {name: max(20, round(count * arguments.scale)) for name, count in counts.items()}
        for counts in (PRETRAINING, STEPS)
    )
    held_out = {name: max(24, round(count * min(1.0, arguments.scale))) for name, count in HELD_OUT.items()}
    run_dir, device, seed = arguments.run_dir, arguments.device, arguments.seed
    if arguments.stage == "sam":
        stage = SamStage(pretraining["sam"], device=device, held_out=held_out["sam"], seed=seed)
        train(stage, _schedule(pretraining["sam"], steps["sam"], 1e-3), run_dir)
    if arguments.stage in ("vlm", "base"):
        stage = VlmStage(
            pretraining["vlm"],
            steps["vlm"],
            untaught=UNTAUGHT_FAMILIES if arguments.stage == "base" else frozenset(),
            name=arguments.stage,
            device=device,
            held_out=held_out["vlm"],
            seed=seed,
        )
        train(stage, _schedule(pretraining["vlm"], steps["vlm"], 1.5e-3), run_dir)
    if arguments.stage in ("ctm", "base-ctm"):
        is_base = arguments.stage == "base-ctm"
        model, processor = load_stage(run_dir, "base" if is_base else "vlm")
        folder = run_dir / "base" if is_base else run_dir
        phases = CtmSteps()
        phases = CtmSteps(*(max(10, round(count * min(1.0, arguments.scale))) for count in astuple(phases)))
        stage = CtmStage(
            model,
            processor,
            folder,
            phases,
            tasks=max(48, round(9600 * min(1.0, arguments.scale))),
            device=device,
            held_out=held_out["ctm"],
            seed=seed,
        )
        train(
            stage,
            Schedule(phases.total, learning_rate=5e-4, warmup=50, decay=0.4, evaluate_every=400),
            folder,
        )
        output_dir = run_dir / ("base-checkpoint" if is_base else "checkpoint")
        write_checkpoint(model.cpu(), processor, arguments.output_dir or output_dir)


def _schedule(pretraining: int, steps: int, learning_rate: float) -> Schedule:
    return Schedule(pretraining + steps, learning_rate, restart=pretraining, evaluate_every=500)


if __name__ == "__main__":
    main()
