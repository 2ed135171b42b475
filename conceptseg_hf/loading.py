"""From what a user names to a model and its processor."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

import conceptseg_hf

from .configuration_conceptseg import ConceptSegConfig, conversion_hint, is_original_config
from .devices import default_device, stored_value
from .modeling_conceptseg import ConceptSegForSegmentation
from .processing_conceptseg import ConceptSegProcessor


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


def load_config(checkpoint: str) -> ConceptSegConfig:
    """The config of a checkpoint.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If it is no ConceptSeg checkpoint.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if is_original_config(config.to_dict()):
        raise ValueError(conversion_hint(checkpoint))
    if not isinstance(config, ConceptSegConfig):
        raise ValueError(
            f"model {checkpoint!r} is of the type {config.model_type!r}, not a ConceptSeg checkpoint; give the "
            "folder or id of one."
        )
    return config


def profile_of(name: str | os.PathLike | None) -> str | None:
    """The profile that a checkpoint's config names; None also where no config can be read, which loading will tell."""
    try:
        return load_config(find_checkpoint(name)).profile
    except (OSError, ValueError):
        return None


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
    load_config(
        checkpoint
    )  # the smallest file first; AutoProcessor would make something of nearly any folder
    processor = AutoProcessor.from_pretrained(checkpoint)
    if not isinstance(processor, ConceptSegProcessor):
        raise ValueError(f"model {checkpoint!r} has no ConceptSegProcessor; save one beside it.")
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    return model.to(where).eval(), processor


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """What tells one model from another: the name it was loaded by, and a hash of the first values of each weight."""
    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        if name in model.all_tied_weights_keys:  # offloaded, it is a parameter of its own
            continue
        digest.update(name.encode())
        first = stored_value(model, name).detach().flatten()[:64]
        digest.update(first.float().cpu().numpy().tobytes())
    return {"model": str(model.config.name_or_path), "weights": digest.hexdigest()[:16]}


def configuration_hash(model: ConceptSegForSegmentation, processor: ConceptSegProcessor) -> str:
    """A hash of what besides weights decides results: prompt, canvas, image sizes, router, and the like."""
    config = model.config
    switches = {name: value for name, value in config.switches.items() if name != "profile"}
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
