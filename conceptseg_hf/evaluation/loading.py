"""From what a user names to a model and its processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

import conceptseg_hf

from ..modeling_conceptseg import ConceptSegForSegmentation
from ..processing_conceptseg import ConceptSegProcessor


def find_checkpoint(name: str | os.PathLike | None) -> str:
    """The folder or hub id of a checkpoint; None stands for the embedded one.

    Raises:
        FileNotFoundError: If there is no embedded checkpoint.
    """
    if name is not None:
        return os.fspath(name)
    folder = conceptseg_hf.nano_checkpoint()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            "the embedded checkpoint is not there; train it with `make nano`, or name another with --model."
        )
    return str(folder)


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    )
    return accelerator or torch.device("cpu")


def load_model_and_processor(
    name: str | os.PathLike | None = None, device: str | torch.device | None = None, dtype: str = "auto"
) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Loads a checkpoint for inference.

    Args:
        name: Folder or hub id; None for the embedded checkpoint.
        device: Where to; an accelerator by default, if there is one.
        dtype: `"auto"` for the checkpoint's, or a name such as `"bfloat16"`.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If it is no ConceptSeg checkpoint, or the device cannot be used.
    """
    checkpoint = find_checkpoint(name)
    where = default_device() if device is None else _checked_device(device)
    processor = AutoProcessor.from_pretrained(checkpoint)
    if not isinstance(processor, ConceptSegProcessor):
        raise ValueError(
            f"model {checkpoint!r} is not a ConceptSeg checkpoint; give the folder or id of one."
        )
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    return model.to(where).eval(), processor


def fingerprint(model: Any) -> dict[str, Any]:
    """What tells one checkpoint from another: its name, and the sizes and times of its weight files."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    files = sorted(Path(name).glob("*.safetensors")) if name and Path(name).is_dir() else []
    return {
        "model": name,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here; give cpu, or an accelerator that `conceptseg "
            "info` shows."
        ) from error
    return where
