"""What the commands of `nano` and `mini` have in common: options, errors and parallel stages."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run; errors are reported in one sentence."""
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        run(arguments)
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command to resume from the last saved state.\n")
        sys.exit(130)


def make_parser(
    package: str, description: str, run_dir: Path, stages: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser with the options of all commands.

    Args:
        package: Package of the command.
        description: First sentence of the help.
        run_dir: Default folder of states, logs and weights.
        stages: Names of the stages; "all" is added. Without stages, there are no options for stages and checkpoint.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=description)
    if stages:
        parser.add_argument(
            "--stage",
            choices=[*stages, "all"],
            default="all",
            help="which stage to run (default: %(default)s)",
        )
        parser.add_argument(
            "--output-dir",
            type=Path,
            help="folder of the checkpoint (default: below the folder of --run-dir)",
        )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=run_dir,
        help="folder of states, logs and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of all stages (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads per stage (default: PyTorch's default)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of the number of steps (default: %(default)s)"
    )
    return parser


def require_checkpoint(parser: argparse.ArgumentParser, folder: Path, remedy: str, option: str = "") -> None:
    """Exit with an error of the parser if a folder is not a checkpoint.

    Args:
        parser: The parser.
        folder: The folder.
        remedy: How to get a checkpoint.
        option: Option with a space, for the error.
    """
    if not (folder / "config.json").is_file():
        parser.error(f"{option}{str(folder)!r} is not a checkpoint; {remedy}.")


def run_in_parallel(package: str, stages: Sequence[str], threads: int | None, options: Sequence[str]) -> None:
    """Run each stage of a package in a separate process; the processes share the CPU cores.

    Args:
        package: Package of the command.
        stages: The stages.
        threads: CPU threads per stage; by default the cores are divided.
        options: Further options of the command.

    Raises:
        SystemExit: If a stage fails. The others are terminated, and resume when the command is run again.
    """
    threads = threads or max(1, torch.get_num_threads() // len(stages))
    command = [sys.executable, "-m", package, "--threads", str(threads), *options]
    processes = [subprocess.Popen([*command, "--stage", stage]) for stage in stages]
    try:
        for process in processes:
            if process.wait():
                sys.exit(process.returncode)
    finally:
        for process in processes:
            process.terminate()


def common_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options of a command, except for stage and threads, as a command line."""
    names = ("run_dir", "device", "seed", "scale", "family", "root", "start", "sam")
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def scaled(count: int, scale: float, minimum: int = 10) -> int:
    """Return a number of steps times a factor."""
    return max(minimum, round(count * scale))
