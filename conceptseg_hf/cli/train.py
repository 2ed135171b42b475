"""`conceptseg train`: the trainings of the paper's two stages, by recipe."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .arguments import BadInputError, as_bad_input, spare_threads

_SCRIPTS = {"sft": "sft", "meta-grpo": "meta_grpo"}


def add_parser(verbs: Any) -> None:
    """Adds the verb to the command."""
    parser = verbs.add_parser(
        "train",
        help="train by a recipe: sft (stage I) or meta-grpo (stage II)",
        description="Trains the concept translation module (sft), or the whole policy by reinforcement (meta-grpo), "
        "as a recipe says; recipes are in trainers/recipes. For several processes, start the module "
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
    """Runs the verb."""
    try:
        script = importlib.import_module(f"conceptseg_trainers.scripts.{_SCRIPTS[arguments.stage]}")
        common = importlib.import_module("conceptseg_trainers.scripts.common")
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"training needs a package that is missing ({error.name}); install all with: "
            "pip install conceptseg-hf[train]"
        ) from error
    except ImportError as error:  # TRL is too old
        raise BadInputError(str(error)) from error
    if not arguments.options:
        raise BadInputError(
            "no recipe is given; name one: --config trainers/recipes/nano_sft.yaml, for example."
        )
    trainer = as_bad_input(script.prepare, arguments.options)
    spare_threads(trainer.concept_model)
    common.run(trainer)
    return 0
