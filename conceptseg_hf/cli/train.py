"""`conceptseg train`: the trainings of the paper's two stages, by recipe."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .arguments import BadInputError, as_bad_input, hide_bars, limit_threads

_SCRIPTS = {"sft": "sft", "meta-grpo": "meta_grpo"}
# recipe_parser.recipe_names(), which cannot be imported without torch; a test holds the two together.
RECIPES = (
    "3b_meta_grpo",
    "3b_meta_grpo_lora",
    "3b_sft",
    "7b_meta_grpo",
    "7b_sft",
    "nano_meta_grpo",
    "nano_sft",
)


def add_parser(subcommands: Any) -> None:
    """Adds the subcommand to the command."""
    parser = subcommands.add_parser(
        "train",
        help="train by a recipe: sft (stage I) or meta-grpo (stage II)",
        description="Trains the concept translation module (sft), or the whole policy by reinforcement (meta-grpo), "
        f"as a recipe says: {', '.join(RECIPES)}, or a YAML file of yours. For several processes, start the module "
        "conceptseg_trainers.scripts.sft or .meta_grpo with torchrun or accelerate launch.",
        usage="%(prog)s {sft,meta-grpo} --config RECIPE [--any_field VALUE ...]",
    )
    parser.add_argument("stage", choices=_SCRIPTS, help="what to train")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="--config RECIPE [--any_field VALUE ...]",
        help="a recipe, and fields that replace its own; --help lists all",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand."""
    try:
        script = importlib.import_module(f"conceptseg_trainers.scripts.{_SCRIPTS[arguments.stage]}")
        running = importlib.import_module("conceptseg_trainers.scripts.running")
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"training needs a package that is missing ({error.name}); install all with: "
            "pip install conceptseg-hf[train]"
        ) from error
    except ImportError as error:  # TRL is too old
        raise BadInputError(str(error)) from error
    if not arguments.options:
        raise BadInputError(
            f"no recipe is given; name one: --config nano_{_SCRIPTS[arguments.stage]}, for example."
        )
    hide_bars()
    trainer = as_bad_input(script.prepare, arguments.options)
    limit_threads(trainer.concept_model)
    try:
        as_bad_input(running.run, trainer)
    except running.DivergedError as error:
        raise BadInputError(str(error)) from error
    return 0
