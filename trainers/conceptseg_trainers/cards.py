"""Model cards of trained checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptseg_hf import ConceptSegConfig
from conceptseg_hf.cards import save_model_card


def write_training_card(
    folder: str | os.PathLike,
    config: ConceptSegConfig,
    training: str,
    tags: Sequence[str] = (),
    **metadata: Any,
) -> None:
    """Write the model card of a trained checkpoint, instead of the card that the trainer's base class writes.

    Args:
        folder: Folder of the checkpoint.
        config: Configuration of the model; the checkpoint that it was loaded from is listed as base model.
        training: Description of the training.
        tags: Further tags.
        **metadata: Further fields of `ModelCardData`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    bases = [config.name_or_path] if config.name_or_path else []
    metadata = {name: value for name, value in metadata.items() if value}
    save_model_card(folder, config, bases, tags=list(dict.fromkeys(tags)), training=training, **metadata)


def as_list(values: str | Sequence[str] | None) -> list[str]:
    """Return one value, several values or None as a list."""
    return [values] if isinstance(values, str) else list(values or ())


__all__ = ["as_list", "write_training_card"]
