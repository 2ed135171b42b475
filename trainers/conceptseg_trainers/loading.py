"""Load models and processors by name with the settings of a trainer, as GRPOTrainer does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor

# Arguments of `from_pretrained` for locating files; the second group is specific to one repository.
_SOURCE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
_REPOSITORY_ARGUMENTS = ("revision", "subfolder", "variant")


def load_model(
    checkpoint: str | os.PathLike,
    args: TrainingArguments,
    quantization_config: Any = None,
    another_repository: bool = False,
    model_class: Any = ConceptSegForSegmentation,
) -> Any:
    """Load a checkpoint with `args.model_init_kwargs`, as GRPOTrainer does.

    Args:
        checkpoint: Folder or hub id of the checkpoint.
        args: Settings of the trainer.
        quantization_config: Quantization of the VLM, if any.
        another_repository: Whether to ignore arguments that are specific to the repository of the trained model.
        model_class: Class of the model.

    Raises:
        ValueError: If a quantization is given twice, or the checkpoint cannot be used.
    """
    options = _options(args)
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError(
                "quantization_config is passed as an argument and in model_init_kwargs; pass it once."
            )
        options["quantization_config"] = quantization_config
    if another_repository:
        options = {name: value for name, value in options.items() if name not in _REPOSITORY_ARGUMENTS}
    if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        options.pop("device_map", None)  # each process puts the model on its own device
    return model_class.from_pretrained(checkpoint, **options)


def load_processor(
    checkpoint: str | os.PathLike, args: TrainingArguments, processor_class: Any = ConceptSegProcessor
) -> Any:
    """Load the processor of a checkpoint, of the given class, from the same location as `load_model`."""
    options = _options(args)
    names = (*_SOURCE_ARGUMENTS, *_REPOSITORY_ARGUMENTS[:2])
    return processor_class.from_pretrained(
        checkpoint, **{name: options[name] for name in names if name in options}
    )


def _options(args: TrainingArguments) -> dict[str, Any]:
    return dict(getattr(args, "model_init_kwargs", None) or {})


@contextmanager
def changed_settings(settings: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Temporarily change attributes of an object, such as training arguments or a config."""
    original = {name: getattr(settings, name) for name in values}
    for name, value in values.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(settings, name, value)


__all__ = ["changed_settings", "load_model", "load_processor"]
