"""What a batch job does: its images, its concept or prompt, the model, and the settings that its results depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoProcessor

import conceptseg_hf

from ..concept_prompt import ConceptPrompt
from ..conversion.sources import SafetensorsSource, find_folder
from ..hashing import HASHED_VALUES
from ..images import load_image, load_mask, mask_to_image
from ..loading import configuration_hash, find_checkpoint, load_config, load_model_and_processor
from ..modeling_conceptseg import ConceptSegForSegmentation
from ..processing_conceptseg import ConceptSegProcessor
from ..profiles import apply_profile
from ..references import Reference
from ..writing import json_text
from .sources import ImageSource

FORMAT_VERSION = 1
"""Version of the files in the output folder."""

_SMALL_MODEL = 50_000_000  # parameters


@dataclass(frozen=True)
class BatchJob:
    """A batch job, which can be sent to other processes.

    Attributes:
        images: The images; see `open_images`.
        prompt: The user's prompt; None to use that of the concept.
        concept: An induced concept, or None.
        references: References of the prompt, for images on which the model reasons.
        model: Checkpoint folder or hub id; None for the embedded checkpoint.
        device: Device of the model; by default an accelerator if available.
        dtype: See `load_model_and_processor`.
        router: Router mode; see `ConceptSegForSegmentation.segment`.
        max_new_tokens: Maximum length of completions; None for the default of the checkpoint.
        profile: Profile to apply to the model, or None.
        template: Prompt template as a dictionary, or None for that of the checkpoint.
        vlm_engine: Name of the engine that writes completions; see `ConceptSegForSegmentation.set_vlm_engine`.
        batch_size: Images per batch. Results depend on it, because batches are padded.
        batches_per_shard: Batches per file of the results.

    Raises:
        ValueError: If neither prompt nor concept is given, or a number is below 1.
    """

    images: ImageSource
    prompt: str | None = None
    concept: ConceptPrompt | None = None
    references: Sequence[Reference] = ()
    model: str | os.PathLike | None = None
    device: str | None = None
    dtype: str = "auto"
    router: str = "adaptive"
    max_new_tokens: int | None = None
    profile: str | None = None
    template: Mapping[str, Any] | None = None
    vlm_engine: str = "transformers"
    batch_size: int = 16
    batches_per_shard: int = 64

    def __post_init__(self) -> None:
        if self.concept is None and not (self.prompt or "").strip():
            raise ValueError("there is neither a prompt nor a concept; give one of them.")
        if self.batch_size < 1 or self.batches_per_shard < 1:
            raise ValueError(
                f"batch_size is {self.batch_size} and batches_per_shard {self.batches_per_shard}; use at "
                "least 1."
            )

    @property
    def text(self) -> str:
        """The prompt of all images."""
        if self.concept is None or (self.prompt or "").strip():
            return self.prompt or ""
        return self.concept.prompt

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    @property
    def num_shards(self) -> int:
        """Number of files of the results."""
        return -(-self.num_batches // self.batches_per_shard)

    def rows_of(self, batch: int) -> range:
        """Return the positions of the images of a batch."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.images)))

    def batches_of(self, shard: int) -> range:
        """Return the batches of a shard."""
        start = shard * self.batches_per_shard
        return range(start, min(start + self.batches_per_shard, self.num_batches))

    def generation(self) -> dict[str, Any] | None:
        """Return the generation settings, or None for those of the checkpoint."""
        return None if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}

    def load(self) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        """Load model and processor with the profile and the template of the job."""
        model, processor = load_model_and_processor(self.model, self.device, self.dtype)
        if model.device.type == "cpu" and model.num_parameters() < _SMALL_MODEL:
            torch.set_num_threads(1)  # for small layers, synchronizing threads takes longer than computing
        self._configure(model, processor)
        model.set_vlm_engine(self.vlm_engine, processor)
        return model, processor

    def _configure(self, model: ConceptSegForSegmentation, processor: ConceptSegProcessor) -> None:
        if self.profile is not None:
            apply_profile(model, processor, self.profile)
        if self.template is not None:
            processor.prompt_template = dict(self.template)

    def settings(self) -> dict[str, Any]:
        """Return the settings that the results depend on, without loading weights.

        Raises:
            OSError: If files cannot be read.
            ValueError: If the checkpoint is damaged.
        """
        checkpoint = find_checkpoint(self.model)
        config = load_config(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config)
        self._configure(model, processor)
        versions = {module.__name__: module.__version__ for module in (conceptseg_hf, torch, transformers)}
        return {
            "format_version": FORMAT_VERSION,
            "images": {"count": len(self.images), "hash": self.images.identity()},
            "prompt": self.text,
            "concept": None if self.concept is None else _hash_of_concept(self.concept),
            "references": [_hash_of_reference(reference) for reference in self.references],
            "router": self.router,
            "vlm_engine": self.vlm_engine,
            "generation": self.generation(),
            "weights": _hash_of_weights(checkpoint),
            "configuration": configuration_hash(model, processor),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "batches_per_shard": self.batches_per_shard,
            "environment": {"model": checkpoint, "device": self.device, **versions},
        }


def read_references(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """Read the images and masks of references into memory, so that they are not read again for each image.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a reference is invalid.
    """
    loaded = []
    for reference in references:
        image = load_image(reference.image)
        mask = None if reference.mask is None else mask_to_image(load_mask(reference.mask, image.size))
        loaded.append(Reference(image, mask, reference.box, reference.role, reference.boxes))
    return tuple(loaded)


def _hash_of_weights(checkpoint: str) -> str:
    """Return a hash of the first values of each tensor in the weight files; see `hashing.weights_hash`."""
    source = SafetensorsSource(find_folder(checkpoint, "model"))
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        values = source.read(name).flatten()[:HASHED_VALUES].contiguous()
        digest.update(f"{name}{source.tensors[name].shape}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    source.release()
    return digest.hexdigest()[:16]


def _hash_of_concept(concept: ConceptPrompt) -> str:
    tokens = concept.concept_embeds
    values = {name: value for name, value in vars(concept).items() if name != "concept_embeds"}
    values["scores"] = [asdict(score) for score in concept.scores]
    digest = hashlib.sha256(json_text(values, sort_keys=True).encode())
    if tokens is not None:
        digest.update(tokens.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash_of_reference(reference: Reference) -> str:
    digest = hashlib.sha256(load_image(reference.image).tobytes())
    if reference.mask is not None:
        digest.update(load_mask(reference.mask).tobytes())
    digest.update(repr((reference.box, reference.boxes, reference.role)).encode())
    return digest.hexdigest()[:16]
