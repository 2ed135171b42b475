"""Checks of model and data that both trainers run before training, and the replacement of unreadable samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import ConceptSample, FileBenchmark, UnreadableSampleError
from conceptseg_hf.data.usable import has_usable_references, with_usable_references
from conceptseg_hf.devices import is_offloaded
from conceptseg_hf.processing_conceptseg import PreparedSample

logger = logging.getLogger(__name__)

# Number of samples, spread over the dataset, that are checked before training; the others are checked when they are
# read.
NUM_CHECKED_SAMPLES = 32


class ReadableSamples(Sequence[ConceptSample]):
    """A sequence of samples in which each unreadable or invalid sample is replaced by the next valid one.

    One broken file should not end a run of several days. The replacement depends only on the index, so that all
    processes and a resumed run see the same samples. Each broken sample is logged once. References that cannot be used
    are dropped and logged once, unless the samples have already replaced them (as benchmarks that are read from files
    do).

    Args:
        samples: Samples that can be indexed.
        check: Called with each sample; raises a ValueError if the sample cannot be used.

    Attributes:
        replacements: Indices of the replacements, by the index of the broken sample.
    """

    def __init__(
        self, samples: Sequence[ConceptSample], check: Callable[[ConceptSample], None] | None = None
    ) -> None:
        self.samples = samples
        self.check = check
        self.replacements: dict[int, int] = {}
        self._has_usable_references = has_usable_references(samples)
        self._logged_faults: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        index = range(len(self))[index]
        position = self.replacements.get(index, index)
        for step in range(len(self)):
            try:
                sample = self._read(position)
            except UnreadableSampleError as error:
                logger.warning("%s; the next readable sample is used instead.", str(error).rstrip("."))
                position, last = (index + step + 1) % len(self), error
            else:
                if position != index:
                    self.replacements[index] = position
                return sample if self._has_usable_references else self._with_usable_references(sample)
        raise ValueError(f"none of the {len(self)} samples can be read; the last error: {last}") from last

    def _read(self, position: int) -> ConceptSample:
        sample = self.samples[position]
        if self.check is not None and isinstance(sample, ConceptSample):
            try:
                self.check(sample)
            except ValueError as error:
                name = sample.sample_id or str(position)
                raise UnreadableSampleError(f"sample {name!r}: {error}") from error
        return sample

    def _with_usable_references(self, sample: ConceptSample) -> ConceptSample:
        usable = with_usable_references(sample)
        for fault in () if usable is sample else usable.reference_faults:
            if fault not in self._logged_faults:
                self._logged_faults.add(fault)
                logger.warning("sample %r is used without a reference: %s", sample.sample_id, fault)
        return usable


def warn_of_shared_images(train: Sequence[ConceptSample], evaluation: Sequence[ConceptSample]) -> None:
    """Warn if evaluation images are also training images, as far as samples are read from files."""
    trained, evaluated = _image_paths(train), _image_paths(evaluation)
    shared = trained & evaluated
    if shared:
        logger.warning(
            "%d of the %d evaluation images, such as %r, are also training images; use disjoint splits for training "
            "and evaluation.",
            len(shared),
            len(evaluated),
            str(min(shared)),
        )


def _image_paths(samples: Sequence[ConceptSample]) -> set[Path]:
    if isinstance(samples, FileBenchmark):
        return {item.image for item in samples.items}
    return set().union(*map(_image_paths, getattr(samples, "datasets", ())))


def spread_indices(length: int) -> list[int]:
    """Return a few indices, evenly spread over a dataset; the rows at these indices are checked before training."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(NUM_CHECKED_SAMPLES, length))})


def check_arguments(
    trainer: str,
    model: Any,
    args: TrainingArguments,
    args_class: type[TrainingArguments],
    processor: Any,
    model_class: Any = ConceptSegForSegmentation,
    processor_class: Any = ConceptSegProcessor,
) -> tuple[Any, Any]:
    """Check the arguments of a trainer.

    Args:
        trainer: Name of the trainer, for error messages.
        model: Must be a model of the required class, without any wrapper.
        args: Settings of the trainer.
        args_class: Required class of the settings.
        processor: Must be the model's processor.
        model_class: Required class of the model.
        processor_class: Required class of the processor.

    Returns:
        The model and the processor.

    Raises:
        ValueError: If one of them cannot be used.
    """
    if not isinstance(model, model_class):
        raise ValueError(
            f"{trainer}: model is a {type(model).__name__}; pass a {model_class.__name__}, or load one with "
            "from_pretrained."
        )
    if is_offloaded(model):
        raise ValueError(
            f"{trainer}: weights of the model are offloaded to the CPU or the disk and cannot be trained; load it "
            "without device_map, and shard it with DeepSpeed or FSDP if it does not fit."
        )
    if not isinstance(args, args_class):
        raise ValueError(f"{trainer}: args is a {type(args).__name__}; pass a {args_class.__name__}.")
    if not isinstance(processor, processor_class):
        raise ValueError(
            f"{trainer}: processing_class is not the model's {processor_class.__name__}; pass it as "
            "processing_class=..."
        )
    try:
        processor.check_family(model.config)
    except ValueError as error:
        raise ValueError(f"{trainer}: {error}") from error
    # The Trainer would wrap the model in DataParallel, which does not replicate everything that a step needs.
    if args.n_gpu > 1:
        raise ValueError(
            f"{trainer}: one process sees {args.n_gpu} GPUs; start one process per GPU with accelerate launch or "
            "torchrun, or select one GPU with CUDA_VISIBLE_DEVICES."
        )
    return model, processor


def check_sample(sample: ConceptSample, size: tuple[int, int]) -> None:
    """Check that a sample can be used for training.

    Args:
        sample: The sample.
        size: (width, height) of its image after EXIF orientation has been applied.

    Raises:
        ValueError: If a mask does not have the image's size, or only a box is given.
    """
    for name, mask in (("mask", sample.mask), ("ignore mask", sample.ignore)):
        if mask is not None and mask.size != size:
            raise ValueError(
                f"sample {sample.sample_id!r}: its {name} has {mask.width} x {mask.height} pixels, but its image has "
                f"{size[0]} x {size[1]}; provide a mask of the image's size."
            )
    if sample.box_only:
        raise ValueError(
            f"sample {sample.sample_id!r} has a box and no mask, which the mask reward and L_seg need; use a copy of "
            "the benchmark with masks, such as the authors' release."
        )


def check_prompt_length(where: str, prepared: PreparedSample, limit: int) -> None:
    """Check the number of tokens of a prompt, including image tokens, before training.

    Args:
        where: Name of the sample, for the error message.
        prepared: The prompt, with the VLM's tensors.
        limit: `max_prompt_length`.

    Raises:
        ValueError: If the prompt is longer than the limit.
    """
    assert prepared.input_ids is not None
    length = len(prepared.input_ids)
    if length > limit:
        raise ValueError(
            f"{where} has a prompt of {length} tokens, more than max_prompt_length = {limit}; increase the limit, "
            "shorten the prompt, or use a processor with a smaller canvas_size."
        )


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """Return one or several evaluation datasets as a dictionary, with keys for error messages."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def rows_to_check(dataset: Any) -> Iterable[dict[str, Any]]:
    """Yield the rows of a dataset that are checked before training.

    Raises:
        ValueError: If the object is not a dataset, or has no rows.
    """
    if isinstance(dataset, datasets.IterableDataset):
        yield from dataset.take(NUM_CHECKED_SAMPLES)
    elif isinstance(dataset, datasets.Dataset):
        if not len(dataset):
            raise ValueError("MetaGRPOTrainer: a dataset has no rows; pass at least one.")
        yield from (dataset[number] for number in spread_indices(len(dataset)))
    else:
        raise ValueError(
            f"MetaGRPOTrainer: a dataset is a {type(dataset).__name__}; pass the result of split_reference_dataset."
        )


def check_sample_ids(dataset: Any, name: str) -> None:
    """Check that sample_id is unique, as it identifies the prompt of a completion.

    Raises:
        ValueError: If several rows have the same sample_id.
    """
    if isinstance(dataset, datasets.Dataset) and len(set(dataset["sample_id"])) < len(dataset):
        raise ValueError(f"{name} has rows with the same sample_id; use a unique one for each row.")
