"""Prompts and completions that a trainer keeps from generation to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from conceptseg_hf import Completion
from conceptseg_hf.images import load_image, load_mask
from conceptseg_hf.inputs import PreparedSample
from conceptseg_hf.prompt_processing import PromptProcessor

from .samples import check_prompt_length
from .split_reference import IGNORE, INDEX

Key: TypeAlias = tuple[str, int | None]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Inputs that all completions of a prompt share.

    Attributes:
        prepared: Inputs of the VLM.
        target: The target image.
        mask: Ground-truth mask of the target, (H, W) bool.
        ignore: Pixels to ignore, (H, W) bool, or None.
        features: SAM's features of the target, with batch size 1; None until the target is encoded.
    """

    prepared: PreparedSample
    target: Image.Image
    mask: Tensor
    ignore: Tensor | None = None
    features: Any = None


@dataclass(frozen=True, eq=False)
class Rollout:
    """A completion: its prompt, its parsed parts, and the text prompt of SAM 3."""

    prompt: Prompt
    completion: Completion
    sam_text: str


@dataclass(frozen=True)
class PromptReader:
    """Reader of dataset rows.

    Attributes:
        processor: Processor of the model.
        vlm_processor: Processor of the VLM alone.
        max_prompt_length: Maximum number of tokens of a prompt.
    """

    processor: PromptProcessor
    vlm_processor: ProcessorMixin
    max_prompt_length: int

    def read(self, row: dict[str, Any]) -> Prompt:
        """Read a row, without encoding the target with SAM 3.

        Raises:
            ValueError: If the prompt is invalid or too long, or the mask does not have the image's size.
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
                if (mask := row.get(column)) is not None:
                    masks[column] = torch.from_numpy(load_mask(mask, target.size))
            except ValueError as error:
                raise ValueError(f"{where}: {column}: {error}") from error
        if "gt_mask" not in masks:
            raise ValueError(f"{where}: gt_mask is None; provide a mask for each row, which may be empty.")
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        text = self.vlm_processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prepared = self.processor.prepare_vlm(
            PreparedSample(prompt=row["problem"], vlm_images=tuple(row["images"]), vlm_text=text)
        )
        check_prompt_length(where, prepared, self.max_prompt_length)
        return Prompt(prepared, target, masks["gt_mask"], masks.get(IGNORE))


def prompt_key(row: dict[str, Any]) -> Key:
    """Return a key that identifies the prompt of a row; all copies of the row have the same key."""
    return row["sample_id"], row.get(INDEX)


def truncate_after_end(ids: list[int], ends: set[int]) -> list[int]:
    """Return the tokens up to and including the first end-of-turn token."""
    position = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[: position + 1]


def _texts(messages: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield the text parts of a prompt, before images are inserted."""
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if part["type"] == "text")
