"""Stage I: `accelerate launch -m conceptseg_trainers.scripts.sft --config RECIPE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..completions import resolve_completion_source
from ..distributed import without_zero_init
from ..sft_config import ConceptSFTConfig
from ..sft_trainer import ConceptSFTTrainer
from .arguments import DataArguments, ModelArguments
from .recipe_parser import RecipeParser
from .running import check_run, main


def make_parser() -> RecipeParser:
    """Return the parser for the recipe and the command line."""
    types = (DataArguments, ModelArguments, ConceptSFTConfig)
    return RecipeParser(types, stage="sft", prog="conceptseg train sft")


def prepare(argv: Sequence[str]) -> ConceptSFTTrainer:
    """Build the trainer from the command line.

    Args:
        argv: `--config RECIPE` and further options.

    Raises:
        OSError: If a file cannot be found.
        ValueError: If an option, the model or the data cannot be used.
    """
    data, model_arguments, args = make_parser().parse(argv)
    check_run(args)
    train, evaluation = data.load(args)
    # Before the model is loaded; the trainer warns if only some samples lack their texts.
    resolve_completion_source(train, args, list_some=False)
    with without_zero_init():  # every process needs the full VLM and SAM 3
        model, processor = model_arguments.load()
    return ConceptSFTTrainer(model, args, train, evaluation, processor)


if __name__ == "__main__":
    sys.exit(main(prepare))
