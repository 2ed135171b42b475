"""`conceptseg train`: training of the paper's two stages from recipes."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .arguments import BadInputError, as_bad_input, hide_bars, limit_threads

_SCRIPTS = {"sft": "sft", "meta-grpo": "meta_grpo", "coprs": "coprs"}
# Copy of recipe_parser.recipe_names(), which requires torch. A test checks that both are equal.
RECIPES = (
    "3b_meta_grpo",
    "3b_meta_grpo_lora",
    "3b_sft",
    "7b_coprs",
    "7b_meta_grpo",
    "7b_sft",
    "nano_coprs",
    "nano_meta_grpo",
    "nano_sft",
    "qwen3_4b_meta_grpo",
    "qwen3_4b_meta_grpo_80gb",
    "qwen3_4b_meta_grpo_lora",
    "qwen3_4b_sft",
)


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "train",
        help="train with a recipe: sft (stage I), meta-grpo (stage II) or coprs",
        description="Trains the concept translation module (sft), the policy with reinforcement learning (meta-grpo), "
        f"or a CoPRS model (coprs). Recipes: {', '.join(RECIPES)}, or a custom YAML file. For several processes, start "
        "the module conceptseg_trainers.scripts.sft, .meta_grpo or .coprs with torchrun or accelerate launch.",
        usage="%(prog)s {sft,meta-grpo,coprs} --config RECIPE [--any_field VALUE ...]",
    )
    parser.add_argument("stage", choices=_SCRIPTS, help="training stage")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="--config RECIPE [--any_field VALUE ...]",
        help="a recipe, and options that override its fields; --help lists all of them",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    try:
        script = importlib.import_module(f"conceptseg_trainers.scripts.{_SCRIPTS[arguments.stage]}")
        running = importlib.import_module("conceptseg_trainers.scripts.running")
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"training needs the missing package {error.name!r}; install all dependencies with: "
            "pip install conceptseg-hf[train]"
        ) from error
    except ImportError as error:  # TRL is too old
        raise BadInputError(str(error)) from error
    if not arguments.options:
        raise BadInputError(
            f"no recipe is given; give one, for example --config nano_{_SCRIPTS[arguments.stage]}."
        )
    hide_bars()
    trainer = as_bad_input(script.prepare, arguments.options)
    limit_threads(trainer.concept_model)
    try:
        as_bad_input(running.run, trainer)
    except running.DivergedError as error:
        raise BadInputError(str(error)) from error
    return 0
