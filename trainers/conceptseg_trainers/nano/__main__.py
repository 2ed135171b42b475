"""Trains conceptseg-nano: `python -m conceptseg_trainers.nano [--stage sam|vlm|ctm|all]`.

The stages "sam" and "vlm" do not depend on each other and may run side by side in two processes; "ctm"
needs both and writes the checkpoint. Every stage resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .assemble import load_stage, write_checkpoint
from .ctm_stage import CtmStage
from .loop import Schedule, train
from .sam_stage import SamStage
from .vlm_stage import VlmStage

SIGHT = {"sam": 3600, "vlm": 5000}  # steps in which only the vision tower trains
STEPS = {"sam": 3400, "vlm": 3200, "ctm": 300}
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
        "--stage", choices=[*STEPS, "all"], default="all", help="which stage to run (default: all)"
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
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the steps of every stage (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sight, steps = (
        {name: max(20, round(count * arguments.scale)) for name, count in counts.items()}
        for counts in (SIGHT, STEPS)
    )
    run_dir, device = arguments.run_dir, arguments.device
    held_out = {name: max(24, round(count * min(1.0, arguments.scale))) for name, count in HELD_OUT.items()}
    if arguments.stage in ("sam", "all"):
        train(
            SamStage(sight["sam"], device=device, held_out=held_out["sam"]),
            Schedule(
                sight["sam"] + steps["sam"], learning_rate=1e-3, restart=sight["sam"], evaluate_every=300
            ),
            run_dir,
        )
    if arguments.stage in ("vlm", "all"):
        train(
            VlmStage(sight["vlm"], steps["vlm"], device=device, held_out=held_out["vlm"]),
            Schedule(
                sight["vlm"] + steps["vlm"], learning_rate=1.5e-3, restart=sight["vlm"], evaluate_every=300
            ),
            run_dir,
        )
    if arguments.stage in ("ctm", "all"):
        model, processor = load_stage(run_dir)
        stage = CtmStage(
            model,
            processor,
            run_dir,
            completions=max(48, round(4800 * min(1.0, arguments.scale))),
            device=device,
            held_out=held_out["ctm"],
        )
        # Short: after two passes over its completions the CTM begins to know them by heart.
        schedule = Schedule(steps["ctm"], learning_rate=5e-4, warmup=50, decay=0.5, evaluate_every=100)
        train(stage, schedule, run_dir)
        write_checkpoint(model.cpu(), processor, arguments.output_dir or run_dir / "checkpoint")


if __name__ == "__main__":
    main()
