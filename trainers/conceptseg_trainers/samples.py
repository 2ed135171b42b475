"""What both trainers ask of model and data before they train, and what they do about samples that cannot be read."""

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

# So many samples, spread over the data, are tried before training; the others are checked as they come.
TRIED = 32


class ReadableSamples(Sequence[ConceptSample]):
    """Samples, of which one that cannot be read or used gives way to the next that can.

    One broken file should not end a run of days. What stands in depends on the index alone, so that all processes, and
    a resumed run, see the same. Each broken sample is named once in the log. References that cannot be used are left
    out and named once, where the samples have not replaced them by others already (as those of files do).

    Args:
        samples: Samples that can be indexed.
        check: Called with each sample; raises a ValueError if it cannot be used.

    Attributes:
        replacements: What stands in for the samples that were found broken: index by index.
    """

    def __init__(
        self, samples: Sequence[ConceptSample], check: Callable[[ConceptSample], None] | None = None
    ) -> None:
        self.samples = samples
        self.check = check
        self.replacements: dict[int, int] = {}
        self._are_tried = has_usable_references(samples)
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        index = range(len(self))[index]
        position = self.replacements.get(index, index)
        for step in range(len(self)):
            try:
                sample = self._read(position)
            except UnreadableSampleError as error:
                logger.warning(
                    "%s; the next sample that can be read takes its place.", str(error).rstrip(".")
                )
                position, last = (index + step + 1) % len(self), error
            else:
                if position != index:
                    self.replacements[index] = position
                return sample if self._are_tried else self._with_usable_references(sample)
        raise ValueError(f"none of the {len(self)} samples can be read; the last says: {last}") from last

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
            if fault not in self._told:
                self._told.add(fault)
                logger.warning("sample %r goes on without a reference: %s", sample.sample_id, fault)
        return usable


def warn_of_shared_images(train: Sequence[ConceptSample], evaluation: Sequence[ConceptSample]) -> None:
    """Warns where an evaluation would run on images that are trained on, as far as samples are files."""
    trained, evaluated = _image_paths(train), _image_paths(evaluation)
    shared = trained & evaluated
    if shared:
        logger.warning(
            "%d of the %d images of the evaluation are trained on, too, such as %r; give rows of training and "
            "evaluation splits of their own.",
            len(shared),
            len(evaluated),
            str(min(shared)),
        )


def _image_paths(samples: Sequence[ConceptSample]) -> set[Path]:
    if isinstance(samples, FileBenchmark):
        return {item.image for item in samples.items}
    return set().union(*map(_image_paths, getattr(samples, "datasets", ())))


def spread_indices(length: int) -> list[int]:
    """A few indices, evenly spread over a data set, whose rows are tried before training."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(TRIED, length))})


def check_arguments(
    trainer: str,
    model: Any,
    args: TrainingArguments,
    args_class: type[TrainingArguments],
    processor: Any,
) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Checks what a trainer is given.

    Args:
        trainer: Its name, for the message.
        model: Must be a ConceptSeg model, without any wrapper.
        args: Its settings.
        args_class: What they must be.
        processor: Must be the model's processor.

    Returns:
        Model and processor.

    Raises:
        ValueError: If one of them cannot be used.
    """
    if not isinstance(model, ConceptSegForSegmentation):
        raise ValueError(
            f"{trainer}: model is a {type(model).__name__}; give a ConceptSegForSegmentation, or load one with "
            "from_pretrained."
        )
    if is_offloaded(model):
        raise ValueError(
            f"{trainer}: weights of the model are offloaded to the CPU or the disk, which cannot be trained; load it "
            "without device_map, and shard it with DeepSpeed or FSDP where it does not fit."
        )
    if not isinstance(args, args_class):
        raise ValueError(f"{trainer}: args is a {type(args).__name__}; give a {args_class.__name__}.")
    if not isinstance(processor, ConceptSegProcessor):
        raise ValueError(
            f"{trainer}: processing_class is not the model's ConceptSegProcessor; pass it as processing_class=..."
        )
    if (
        args.n_gpu > 1
    ):  # the Trainer would wrap the model by DataParallel, which copies less than a step needs
        raise ValueError(
            f"{trainer}: one process sees {args.n_gpu} GPUs; start one process for each with accelerate launch or "
            "torchrun, or show it one with CUDA_VISIBLE_DEVICES."
        )
    return model, processor


def check_sample(sample: ConceptSample, size: tuple[int, int]) -> None:
    """Checks that a sample can be trained on.

    Args:
        sample: The sample.
        size: (width, height) of its image, upright.

    Raises:
        ValueError: If a mask is not of the image's size, or is no more than a box.
    """
    for name, mask in (("mask", sample.mask), ("ignore mask", sample.ignore)):
        if mask is not None and mask.size != size:
            raise ValueError(
                f"sample {sample.sample_id!r}: its {name} has {mask.width} x {mask.height} pixels, but its image has "
                f"{size[0]} x {size[1]}; give a mask of the image's size."
            )
    if sample.box_only:
        raise ValueError(
            f"sample {sample.sample_id!r} has a box and no mask, which the mask reward and L_seg need; train on a copy "
            "of the benchmark that has masks, such as the authors' tree."
        )


def check_prompt_length(where: str, prepared: PreparedSample, limit: int) -> None:
    """Checks the tokens of a prompt, images included, before it is trained on.

    Args:
        where: Names the sample.
        prepared: The prompt, with the VLM's tensors.
        limit: `max_prompt_length`.

    Raises:
        ValueError: If there are too many.
    """
    assert prepared.input_ids is not None
    length = len(prepared.input_ids)
    if length > limit:
        raise ValueError(
            f"{where} has a prompt of {length} tokens, more than max_prompt_length = {limit}; raise that, shorten the "
            "prompt, or give the processor a smaller canvas_size."
        )


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation data sets, one or several, under names for messages."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def rows_to_check(dataset: Any) -> Iterable[dict[str, Any]]:
    """Some rows of a data set, which are checked before training.

    Raises:
        ValueError: If it is no data set, or has no rows.
    """
    if isinstance(dataset, datasets.IterableDataset):
        yield from dataset.take(TRIED)
    elif isinstance(dataset, datasets.Dataset):
        if not len(dataset):
            raise ValueError("MetaGRPOTrainer: a data set has no rows; give some to train on.")
        yield from (dataset[number] for number in spread_indices(len(dataset)))
    else:
        raise ValueError(
            f"MetaGRPOTrainer: a data set is a {type(dataset).__name__}; give what split_reference_dataset returns."
        )


def check_sample_ids(dataset: Any, name: str) -> None:
    """Completions find their prompt by its sample_id.

    Raises:
        ValueError: If rows share one.
    """
    if isinstance(dataset, datasets.Dataset) and len(set(dataset["sample_id"])) < len(dataset):
        raise ValueError(f"{name} has rows that share a sample_id; give each row its own.")
