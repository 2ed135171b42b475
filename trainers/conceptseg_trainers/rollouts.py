"""Prompts and their completions, as `MetaGRPOTrainer` keeps them from generation to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from conceptseg_hf import Completion, ConceptSegProcessor
from conceptseg_hf.images import load_image, load_mask
from conceptseg_hf.inputs import PreparedSample
from conceptseg_hf.sam_prompt import ImageFeatures

from .samples import check_prompt_length
from .split_reference import IGNORE, INDEX

Key: TypeAlias = tuple[str, int | None]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the completions of a prompt share.

    Attributes:
        prepared: The VLM's input.
        target: The target image.
        mask: (H, W) bool, its true mask.
        ignore: (H, W) bool, the pixels that do not count; None when all do.
        features: What SAM 3 sees in it, a batch of one.
    """

    prepared: PreparedSample
    target: Image.Image
    mask: Tensor
    ignore: Tensor | None = None
    features: ImageFeatures | None = None


@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion: its prompt, its parts, and the words that SAM 3 gets."""

    prompt: Prompt
    completion: Completion
    sam_text: str


@dataclass(frozen=True)
class PromptReader:
    """Reads the rows of a data set.

    Attributes:
        processor: The model's processor.
        vlm_processor: The VLM's plain one.
        max_prompt_length: The most tokens of a prompt.
    """

    processor: ConceptSegProcessor
    vlm_processor: ProcessorMixin
    max_prompt_length: int

    def read(self, row: dict[str, Any]) -> Prompt:
        """Reads a row; SAM 3 has not seen the image yet.

        Raises:
            ValueError: If the prompt cannot be used or is too long, or the mask is not of the image's size.
        """
        where = f"sample {row['sample_id']!r}"
        try:
            self.processor.check_prompt(row["problem"])
            for text in _texts(row["prompt"]):
                self.processor.check_text(text, "prompt")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        target = load_image(row["target_image"])
        masks: dict[str, Tensor] = {}
        for column in ("gt_mask", IGNORE):
            try:
                if (given := row.get(column)) is not None:
                    masks[column] = torch.from_numpy(load_mask(given, target.size))
            except ValueError as error:
                raise ValueError(f"{where}: {column}: {error}") from error
        if "gt_mask" not in masks:
            raise ValueError(f"{where}: gt_mask is None; give each row a mask, if only an empty one.")
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        text = self.vlm_processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prepared = self.processor.prepare_vlm(
            PreparedSample(prompt=row["problem"], vlm_images=tuple(row["images"]), vlm_text=text)
        )
        check_prompt_length(where, prepared, self.max_prompt_length)
        return Prompt(prepared, target, masks["gt_mask"], masks.get(IGNORE))


def prompt_key(row: dict[str, Any]) -> Key:
    """What the copies of a row share, and no other row has."""
    return row["sample_id"], row.get(INDEX)


def truncate_after_end(ids: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends a completion, and with it."""
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def _texts(messages: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The words of a prompt, before images are put between them."""
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if part["type"] == "text")
