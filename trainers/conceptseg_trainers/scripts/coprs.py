"""CoPRS: `accelerate launch -m conceptseg_trainers.scripts.coprs --config RECIPE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conceptseg_hf import CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.loading import find_checkpoint

from ..coprs_config import CoPRSTrainerConfig
from ..coprs_trainer import CoPRSTrainer
from ..split_reference import split_reference_dataset
from .adapters import AdapterArguments
from .arguments import DataArguments
from .recipe_parser import RecipeParser
from .running import check_run, main

TRAINED_IN_FULL = ("prior", "mask_embed", "mask_decoder")
"""Modules beside the adapters of the VLM: the prior, and what decodes it."""


@dataclass
class CoPRSModelArguments(AdapterArguments):
    """Arguments for the model, and for training LoRA adapters instead of the full VLM.

    Attributes:
        model_name_or_path: Checkpoint of CoPRS, or "coprs-nano" for the embedded one.
        vlm_name_or_path: VLM of a new model; used together with `sam_name_or_path` instead of a checkpoint.
        sam_name_or_path: SAM of a new model: a `SamModel` or a `Sam3TrackerModel`.
        dtype: Dtype of the VLM.
        attn_implementation: Attention implementation of the VLM.
    """

    model_name_or_path: str = field(default="coprs-nano", metadata={"help": "Checkpoint to train."})
    vlm_name_or_path: str | None = field(default=None, metadata={"help": "VLM of a new model."})
    sam_name_or_path: str | None = field(default=None, metadata={"help": "SAM of a new model."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the VLM."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})

    def __post_init__(self) -> None:
        if (self.vlm_name_or_path is None) != (self.sam_name_or_path is None):
            raise ValueError(
                "only one of vlm_name_or_path and sam_name_or_path is given; give both, or a model_name_or_path."
            )

    def load(self) -> tuple[CoPRSForSegmentation, CoPRSProcessor]:
        """Load or build the model and its processor.

        Raises:
            OSError: If a checkpoint cannot be found.
            ValueError: If a checkpoint cannot be used.
        """
        attention: dict[str, Any] = (
            {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        )
        if self.vlm_name_or_path is None or self.sam_name_or_path is None:
            checkpoint = find_checkpoint(self.model_name_or_path)
            model = CoPRSForSegmentation.from_pretrained(checkpoint, dtype=self.dtype, **attention)
            return model, CoPRSProcessor.from_pretrained(checkpoint)
        model = CoPRSForSegmentation.from_backbones(
            self.vlm_name_or_path,
            self.sam_name_or_path,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
        )
        return model, model.processor


def make_parser() -> RecipeParser:
    """Return the parser for the recipe and the command line."""
    types = (DataArguments, CoPRSModelArguments, CoPRSTrainerConfig)
    return RecipeParser(types, stage="coprs", prog="conceptseg train coprs")


def prepare(argv: Sequence[str]) -> CoPRSTrainer:
    """Build the trainer from the command line.

    Args:
        argv: `--config RECIPE` and further options.

    Raises:
        OSError: If a file cannot be found.
        ValueError: If an option, the model or the data cannot be used.
    """
    data, source, args = make_parser().parse(argv)
    check_run(args)
    model, processor = source.load()
    train, evaluation = (
        None if samples is None else split_reference_dataset(samples, seed=args.seed, processor=processor)
        for samples in data.load(args)
    )
    return CoPRSTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        peft_config=source.peft_config(processor.family, TRAINED_IN_FULL),
    )


if __name__ == "__main__":
    sys.exit(main(prepare))
