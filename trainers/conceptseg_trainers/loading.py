"""From the name of a checkpoint to what a trainer trains, as GRPOTrainer loads models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor

# Arguments of `from_pretrained` that say where files come from; the second group belongs to one repository.
_SOURCE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
_REPOSITORY_ARGUMENTS = ("revision", "subfolder", "variant")


def load_model(
    checkpoint: str | os.PathLike,
    args: TrainingArguments,
    quantization_config: Any = None,
    another_repository: bool = False,
) -> ConceptSegForSegmentation:
    """Loads a checkpoint as the settings say, like GRPOTrainer.

    Raises:
        ValueError: If a quantisation is given twice, or the checkpoint cannot be used.
    """
    options = _options(args)
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "MetaGRPOTrainer: quantization_config is given as an argument and in model_init_kwargs; give it once."
            )
        options["quantization_config"] = quantization_config
    if another_repository:
        options = {name: value for name, value in options.items() if name not in _REPOSITORY_ARGUMENTS}
    if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        options.pop("device_map", None)  # every process holds the model on its own device
    return ConceptSegForSegmentation.from_pretrained(checkpoint, **options)


def load_processor(checkpoint: str | os.PathLike, args: TrainingArguments) -> ConceptSegProcessor:
    """Loads the processor of a checkpoint from where `load_model` takes the model."""
    options = _options(args)
    names = (*_SOURCE_ARGUMENTS, *_REPOSITORY_ARGUMENTS[:2])
    return ConceptSegProcessor.from_pretrained(
        checkpoint, **{name: options[name] for name in names if name in options}
    )


def _options(args: TrainingArguments) -> dict[str, Any]:
    return dict(getattr(args, "model_init_kwargs", None) or {})


@contextmanager
def changed_settings(settings: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of an object (arguments, a config) have other values inside."""
    before = {name: getattr(settings, name) for name in values}
    for name, value in values.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


__all__ = ["changed_settings", "load_model", "load_processor"]
