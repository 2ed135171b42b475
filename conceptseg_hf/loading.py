"""Loading of a model and its processor from a checkpoint folder or hub id."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from .configuration_conceptseg import ConceptSegConfig, conversion_hint, is_original_config
from .devices import default_device
from .hashing import weights_hash
from .modeling_conceptseg import ConceptSegForSegmentation
from .processing_conceptseg import ConceptSegProcessor
from .shipped import find_embedded_checkpoint


def find_checkpoint(name: str | os.PathLike | None) -> str:
    """Return the folder or hub id of a checkpoint.

    Args:
        name: Name of an embedded checkpoint ("nano", "mini"), folder or hub id; None for "nano".

    Raises:
        FileNotFoundError: If the name is that of an embedded checkpoint, but this installation does not contain it.
    """
    checkpoint = os.fspath("nano" if name is None else name)
    return os.fspath(find_embedded_checkpoint(checkpoint) or checkpoint)


def load_config(checkpoint: str) -> ConceptSegConfig:
    """Load the config of a checkpoint.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If it is not a ConceptSeg checkpoint.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if is_original_config(config.to_dict()):
        raise ValueError(conversion_hint(checkpoint))
    if not isinstance(config, ConceptSegConfig):
        raise ValueError(
            f"model {checkpoint!r} has model_type {config.model_type!r} and is not a ConceptSeg checkpoint; give the "
            "folder or hub id of a ConceptSeg checkpoint."
        )
    return config


def profile_of(name: str | os.PathLike | None) -> str | None:
    """Return the profile in a checkpoint's config; None if it has none or the config cannot be read."""
    try:
        return load_config(find_checkpoint(name)).profile
    except (OSError, ValueError):
        return None


def load_model_and_processor(
    name: str | os.PathLike | None = None, device: str | torch.device | None = None, dtype: str = "auto"
) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Load a checkpoint for inference.

    Args:
        name: Name of an embedded checkpoint, folder or hub id; see `find_checkpoint`.
        device: Device of the model; by default an accelerator if available, else the CPU.
        dtype: `"auto"` for the dtype of the checkpoint, or a name such as `"bfloat16"`.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If it is not a ConceptSeg checkpoint, or the device is not available.
    """
    checkpoint = find_checkpoint(name)
    target = default_device() if device is None else _check_device(device)
    # Check the config first, because AutoProcessor loads some processor from nearly any folder.
    load_config(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    if not isinstance(processor, ConceptSegProcessor):
        raise ValueError(f"model {checkpoint!r} has no ConceptSegProcessor; save one in the same folder.")
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    return model.to(target).eval(), processor


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Return the name that a model was loaded from and a hash of the first values of each weight."""
    return {"model": str(model.config.name_or_path), "weights": weights_hash({"": model})}


def configuration_hash(model: ConceptSegForSegmentation, processor: ConceptSegProcessor) -> str:
    """Return a hash of all settings that affect results: prompt, canvas, image sizes, router and others."""
    config = model.config
    switches = {name: value for name, value in config.non_default_fields.items() if name != "profile"}
    values = {
        "processor": processor.to_dict(),
        "template": processor.chat_template,
        "model": [
            config.hidden_states_at,
            config.sam_geometry_cls,
            config.router_base,
            *([switches] if switches else []),
        ],
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_device(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(1, device=checked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available; use cpu, or an accelerator that `conceptseg "
            "info` shows."
        ) from error
    return checked
