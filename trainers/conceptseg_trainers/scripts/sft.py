"""Stage I: `accelerate launch -m conceptseg_trainers.scripts.sft --config RECIPE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..distributed import without_zero_init
from ..sft_config import ConceptSFTConfig
from ..sft_trainer import ConceptSFTTrainer
from .common import DataArguments, ModelArguments, RecipeParser, check_run, main


def make_parser() -> RecipeParser:
    """The parser of recipe and command line."""
    return RecipeParser((DataArguments, ModelArguments, ConceptSFTConfig), prog="conceptseg train sft")


def prepare(argv: Sequence[str]) -> ConceptSFTTrainer:
    """Everything before the first step.

    Args:
        argv: `--config RECIPE` and further options.

    Raises:
        OSError: If a file cannot be found.
        ValueError: If an option, the model or the data cannot be used.
    """
    data, model_arguments, args = make_parser().parse(argv)
    check_run(args)
    train, evaluation = data.load(args)
    with without_zero_init():  # every process needs MLLM and SAM 3 whole
        model, processor = model_arguments.load()
    return ConceptSFTTrainer(model, args, train, evaluation, processor)


if __name__ == "__main__":
    sys.exit(main(prepare))
