"""Training of ConceptSeg: stage I, Meta-GRPO, and `conceptseg_trainers.nano`, which trains the embedded checkpoint.

The trainers need the extra `train` (TRL, DeepSpeed, PEFT, Datasets), which is only imported when one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import conceptseg_hf as conceptseg_hf  # before transformers: makes torchvision importable with a CPU-only torch

if TYPE_CHECKING:
    from .coprs_config import CoPRSTrainerConfig
    from .coprs_trainer import CoPRSTrainer
    from .meta_grpo_config import MetaGRPOConfig
    from .meta_grpo_trainer import MetaGRPOTrainer
    from .rewards import (
        box_reward,
        format_reward,
        mask_reward,
        meta_reward,
        position_format_reward,
        soft_mask_reward,
    )
    from .sft_config import ConceptSFTConfig
    from .sft_trainer import ConceptSFTTrainer
    from .split_reference import split_reference_dataset

_MODULES = {
    "CoPRSTrainer": "coprs_trainer",
    "CoPRSTrainerConfig": "coprs_config",
    "ConceptSFTConfig": "sft_config",
    "ConceptSFTTrainer": "sft_trainer",
    "MetaGRPOConfig": "meta_grpo_config",
    "MetaGRPOTrainer": "meta_grpo_trainer",
    "box_reward": "rewards",
    "format_reward": "rewards",
    "mask_reward": "rewards",
    "meta_reward": "rewards",
    "position_format_reward": "rewards",
    "soft_mask_reward": "rewards",
    "split_reference_dataset": "split_reference",
}

__all__ = [
    "CoPRSTrainer",
    "CoPRSTrainerConfig",
    "ConceptSFTConfig",
    "ConceptSFTTrainer",
    "MetaGRPOConfig",
    "MetaGRPOTrainer",
    "box_reward",
    "format_reward",
    "mask_reward",
    "meta_reward",
    "position_format_reward",
    "soft_mask_reward",
    "split_reference_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
