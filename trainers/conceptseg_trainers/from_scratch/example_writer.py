"""Writing of training examples: token ids, mosaics, boxes, and attention targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conceptseg_hf.boxes import Box
from conceptseg_hf.completion import format_box
from conceptseg_hf.coordinates import CoordinateFrame
from conceptseg_hf.mosaic import compose_mosaic
from conceptseg_hf.prompt_processing import PromptProcessor
from conceptseg_hf.references import Reference, resolve_references

from .masks import bounding_box, mask_to_tokens
from .tokenizers import COORDINATE_SCALE
from .vlm_examples import MERGE, AttentionTarget, TrainingExample

# Offsets of the numbers of a box from its opening tag, e.g. in the tokens "<bbox> [ 1 , 2 , 3 , 4 ] </bbox>".
NUMBER_OFFSETS = (2, 4, 6, 8)


@dataclass(frozen=True)
class Entry:
    """A phrase and a box of a perception example.

    Attributes:
        phrase: The phrase.
        phrase_masks: Masks of the objects from which the phrase can be read, by the index of the image; empty for none.
        image: Index of the image of the box.
        mask: Mask of the box.
    """

    phrase: str
    phrase_masks: dict[int, np.ndarray]
    image: int
    mask: np.ndarray


@dataclass(frozen=True)
class TrainingImage:
    """An image of an example.

    Attributes:
        pixels: (S, S, 3) uint8.
        dense: Its dense targets; see `VlmData.dense_loss`.
    """

    pixels: np.ndarray
    dense: Any


class BaseExampleWriter:
    """Convert images, phrases and boxes to training examples, with the tokenizer and template of a processor.

    Its images and prompts equal those of the processor, but are created without its general code, which would take
    longer than a training step.

    Args:
        processor: The processor.
    """

    max_entries = 6
    """Number of phrases in an example of `listing`."""

    def __init__(self, processor: PromptProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.size = processor.canvas_size
        self.grid = self.size // processor.image_processor.patch_size // MERGE
        vocabulary = self.tokenizer.get_vocab()
        self.ids = {
            name: vocabulary[name]
            for name in ("<check>", "<bbox>", "</think>", "<answer>", "</answer>", "<|im_end|>")
        }

    def listing(
        self,
        rng: np.random.Generator,
        instruction: str,
        images: Sequence[TrainingImage],
        entries: Sequence[Entry],
        first_guided: int = 0,
        noise: bool = True,
    ) -> TrainingExample:
        """Create an example with up to `max_entries` phrases and their locations, in random order.

        Args:
            rng: Random generator.
            instruction: The instruction of the prompt.
            images: The images.
            entries: The phrases and boxes.
            first_guided: Index of the first word of a phrase that has an attention target.
            noise: Whether to replace some words in the input of the VLM; see `with_noise`.
        """
        completion: list[int] = []
        attention_targets: list[AttentionTarget] = []
        listed = [entries[int(i)] for i in rng.permutation(len(entries))[: self.max_entries]]
        for entry in listed:
            words = self.token_ids(entry.phrase)
            if entry.phrase_masks:
                tokens = {number: self.mask_to_tokens(mask) for number, mask in entry.phrase_masks.items()}
                attention_targets += [
                    AttentionTarget(len(completion) + i, tokens) for i in range(first_guided, len(words))
                ]
            completion += words
            location, targets = self.location(entry, len(completion))
            completion += location
            attention_targets += targets
        completion.append(self.ids["<|im_end|>"])
        example = TrainingExample(
            tuple(image.pixels for image in images),
            self.prompt_ids(instruction, len(images)),
            completion,
            self.with_noise(rng, completion) if noise else completion,
            tuple(attention_targets),
            tuple(image.dense for image in images),
        )
        return self.finish_listing(example, listed)

    def location(self, entry: Entry, position: int) -> tuple[list[int], list[AttentionTarget]]:
        """Return the tokens of the location of an entry, its box, which start at a position, and their targets."""
        box = self.canvas_box_to_text(bounding_box(entry.mask))
        tokens = self.token_ids(f"<bbox>{format_box(box, COORDINATE_SCALE)}</bbox>")
        return tokens, box_targets(position, {entry.image: self.mask_to_tokens(entry.mask)})

    def finish_listing(self, example: TrainingExample, listed: Sequence[Entry]) -> TrainingExample:
        """Return the example of the listed entries; subclasses add what their training needs of the entries."""
        return example

    def with_noise(self, rng: np.random.Generator, completion: Sequence[int]) -> list[int]:
        """Return a completion as the input of the VLM; subclasses replace some words."""
        return list(completion)

    def mosaic(self, references: Sequence[Reference]) -> tuple[np.ndarray, CoordinateFrame]:
        """Return the mosaic of references and its coordinate frame."""
        resolved = resolve_references(references)
        frame = self.processor.make_frame((self.size, self.size), resolved)
        layout = frame.layout
        assert layout is not None  # there are references
        return np.asarray(compose_mosaic(resolved.images, resolved.boxes, layout, resolved.proxy)), frame

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_ids(
        self, instruction: str, image_count: int, processor: PromptProcessor | None = None
    ) -> list[int]:
        """Return the token ids of a prompt, with expanded image tokens."""
        text = (processor or self.processor).chat_text(instruction, image_count)
        token = self.processor.image_token
        return self.token_ids(text.replace(token, token * self.grid**2))

    def mask_to_tokens(self, mask: np.ndarray) -> np.ndarray:
        """Return the image tokens of a mask; see `masks.mask_to_tokens`."""
        return mask_to_tokens(mask, self.grid)

    def canvas_box_to_text(self, box: Sequence[float]) -> Box:
        """Map a box from canvas pixels to text units."""
        x1, y1, x2, y2 = (value * COORDINATE_SCALE / self.size for value in box)
        return x1, y1, x2, y2

    def text_box_to_tokens(self, box: Sequence[float]) -> np.ndarray:
        """Return the image tokens of a box in text units."""
        x1, y1, x2, y2 = (value * self.size / COORDINATE_SCALE for value in box)
        mask = np.zeros((self.size, self.size), dtype=bool)
        mask[round(y1) : max(round(y2), round(y1) + 1), round(x1) : max(round(x2), round(x1) + 1)] = True
        return self.mask_to_tokens(mask)


def box_targets(start: int, tokens: dict[int, np.ndarray]) -> list[AttentionTarget]:
    """Return the attention targets of the numbers of a box.

    Args:
        start: Index of the opening tag of the box in the completion.
        tokens: See `AttentionTarget`.
    """
    return [AttentionTarget(start + offset, tokens) for offset in NUMBER_OFFSETS]
