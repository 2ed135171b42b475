"""Stage II: `accelerate launch -m conceptseg_trainers.scripts.meta_grpo --config RECIPE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..meta_grpo_config import MetaGRPOConfig
from ..meta_grpo_trainer import MetaGRPOTrainer
from ..split_reference import split_reference_dataset
from .adapters import AdapterArguments
from .arguments import DataArguments, ModelArguments
from .recipe_parser import RecipeParser
from .running import check_run, main


@dataclass
class SplitReferenceArguments(DataArguments):
    """Arguments for the data and for composing references.

    Attributes:
        grid: Number of cells per side of the mosaic, K.
    """

    grid: int = field(default=2, metadata={"help": "Cells per side of the reference mosaic."})


@dataclass
class PolicyArguments(AdapterArguments, ModelArguments):
    """Arguments for the model, and for training LoRA adapters instead of the full VLM.

    Attributes:
        load_in_4bit: Load the frozen VLM in 4 bits (needs bitsandbytes).
    """

    load_in_4bit: bool = field(default=False, metadata={"help": "Frozen VLM in 4 bits; needs use_peft."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_4bit and not self.use_peft:
            raise ValueError(
                "load_in_4bit is true without use_peft; 4-bit weights cannot be trained, so set use_peft."
            )

    def load_kwargs(self) -> dict[str, Any]:
        """See `ModelArguments.load_kwargs`."""
        kwargs = super().load_kwargs()
        if self.load_in_4bit:
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        return kwargs


def make_parser() -> RecipeParser:
    """Return the parser for the recipe and the command line."""
    types = (SplitReferenceArguments, PolicyArguments, MetaGRPOConfig)
    return RecipeParser(types, stage="meta_grpo", prog="conceptseg train meta-grpo")


def prepare(argv: Sequence[str]) -> MetaGRPOTrainer:
    """Build the trainer from the command line.

    Args:
        argv: `--config RECIPE` and further options.

    Raises:
        OSError: If a file cannot be found.
        ValueError: If an option, the model or the data cannot be used.
    """
    data, policy, args = make_parser().parse(argv)
    check_run(args)
    train, evaluation = (
        None if samples is None else split_reference_dataset(samples, data.grid, args.seed)
        for samples in data.load(args)
    )
    model, processor = policy.load(args.model_init_kwargs)
    args.model_init_kwargs = None  # already applied
    return MetaGRPOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        peft_config=policy.peft_config(processor.family, ["ctm"]),
    )


if __name__ == "__main__":
    sys.exit(main(prepare))
