"""Settings that `MetaGRPOConfig` and `CoPRSTrainerConfig` have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from trl import GRPOConfig

_UNSUPPORTED = {
    "sync_ref_model": "the reference policy is fixed",
    "cast_lm_head_to_fp32": "TRL expects the head on the model itself, not on its VLM",
    "remove_unused_columns": "SAM and the rewards need columns that the VLM does not use",
    "dataloader_persistent_workers": "persistent workers would keep the mosaics of the first epoch",
}


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Temporarily suppress the deprecation warnings for the old name of activation checkpointing, which TRL uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


@dataclass
class SegmentationGRPOConfig(GRPOConfig):
    """Settings of a GRPO trainer whose completions are also decoded to masks; see its subclasses.

    Its own fields are `max_prompt_length`, `sam_decode_batch_size`, `num_best_and_worst`, `ref_model_name_or_path`,
    `freeze_vision_tower`, `log_examples` and `log_examples_steps`, which the subclasses describe.
    """

    loss_type: str = field(default="grpo", metadata={"help": "See trl.GRPOConfig."})
    # Images would be pickled across processes in every generation.
    log_multimodal: bool = field(
        default=False, metadata={"help": "Log images with the completions; slow with several processes."}
    )

    max_prompt_length: int = field(default=2048, metadata={"help": "Maximum tokens of a prompt."})
    sam_decode_batch_size: int = field(default=8, metadata={"help": "Batch size for decoding masks."})
    num_best_and_worst: int | None = field(
        default=None,
        metadata={"help": "Number of best and of worst completions per group to train on; all by default."},
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of the reference policy."}
    )
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Freeze the vision tower."})
    log_examples: int = field(default=4, metadata={"help": "Example images per log; 0 for none."})
    log_examples_steps: int = field(default=50, metadata={"help": "Steps between example images."})

    def __post_init__(self) -> None:
        self._check_fields()
        try:
            with without_renaming_warnings():
                super().__post_init__()
        except ValueError as error:
            group_size = self.num_generations
            if self.generation_batch_size and group_size and self.generation_batch_size % group_size:
                raise ValueError(
                    f"{type(self).__name__}: a generation batch of {self.generation_batch_size} completions "
                    "(per_device_train_batch_size x processes x steps_per_generation) does not consist of whole groups "
                    f"of num_generations = {group_size}; make it a multiple of num_generations."
                ) from error
            raise
        self._check_groups()

    def _check_groups(self) -> None:
        """Check that the selected completions fill whole batches on each process."""
        count = self.num_best_and_worst
        if count is None:
            return
        # GRPOConfig sets both, although their types are optional.
        group_size, steps = cast(int, self.num_generations), cast(int, self.steps_per_generation)
        if not 1 <= count <= group_size // 2:
            raise ValueError(
                f"{type(self).__name__}: num_best_and_worst is {count}; use 1 to {group_size // 2} (half of "
                f"num_generations)."
            )
        num_completions = self.per_device_train_batch_size * steps
        if num_completions % group_size or self.per_device_train_batch_size * 2 * count % group_size:
            raise ValueError(
                f"{type(self).__name__}: num_best_and_worst = {count} does not select a whole number of the "
                f"{self.per_device_train_batch_size} completions per device from groups of {group_size}; make "
                "per_device_train_batch_size a multiple of num_generations."
            )

    def _check_fields(self) -> None:
        """Check the fields that do not depend on others; subclasses extend it."""
        name_of_class = type(self).__name__
        for name in ("max_prompt_length", "sam_decode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name_of_class}: {name} is {getattr(self, name)}; use at least 1.")
        for name in ("log_examples", "log_examples_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name_of_class}: {name} is {getattr(self, name)}; use 0 or more.")
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"{name_of_class}: {name} is true, but {reason}; remove it.")
