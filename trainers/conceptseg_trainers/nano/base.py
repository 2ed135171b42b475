"""nano-base, the checkpoint that the experiments with stage II start from."""

from __future__ import annotations

from pathlib import Path

from conceptseg_hf.shipped import find_shipped_folder

TRAINING = (
    "train one with `python -m conceptseg_trainers.nano`, stages sam, base, base-referring and base-ctm"
)
"""How to train it, for errors."""


def nano_base_checkpoint() -> Path:
    """Return nano-base of the repository, or, as wheels do not contain it, the folder that its training writes."""
    checkpoints = find_shipped_folder("checkpoints", "conceptseg_trainers")
    shipped = None if checkpoints is None else checkpoints / "nano-base"
    return shipped if shipped and shipped.is_dir() else Path("runs/nano/base-checkpoint")
