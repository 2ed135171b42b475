"""What a processor makes of images, prompts and references, and `ConceptSegForSegmentation.segment` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from transformers import BatchFeature

from .coordinates import CoordinateFrame

_T = TypeVar("_T")


@dataclass(eq=False)
class PreparedSample:
    """One prompt, ready for the model. The VLM's tensors are None until the processor's `prepare_vlm`.

    Attributes:
        prompt: The user's words.
        frame: The sample's coordinate frames.
        sam_pixel_values: SAM 3's input, (3, S, S).
        vlm_images: What the VLM sees, as images of canvas size: the mosaic (if there are references),
            then the target.
        vlm_text: The chat text, with one image token per image.
        input_ids: Token ids of the chat, image tokens expanded, (L,).
        mm_token_type_ids: 1 at image tokens, else 0, (L,).
        pixel_values: Patches of all images, (patches, d).
        image_grid_thw: Patch grid of each image, (images, 3).
        error: None, or one sentence that says why this sample cannot be segmented; all tensors are None then.
        shortcut_pixel_values: SAM 3's input on the shortcut, (3, S, S), where it differs (`shortcut_size`); else
            None.
    """

    prompt: str
    frame: CoordinateFrame | None = None
    sam_pixel_values: torch.Tensor | None = None
    vlm_images: tuple[Image.Image, ...] = ()
    vlm_text: str = ""
    input_ids: torch.Tensor | None = None
    mm_token_type_ids: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    error: str | None = None
    shortcut_pixel_values: torch.Tensor | None = None

    @property
    def coordinates(self) -> CoordinateFrame:
        """The sample's coordinate frames.

        Raises:
            ValueError: If the sample could not be prepared.
        """
        return known(self.frame, "coordinate frames")

    @classmethod
    def failed(cls, prompt: str, error: str) -> PreparedSample:
        """The stand-in for an item that could not be prepared."""
        return cls(prompt=prompt, error=error)


class ConceptSegInputs(BatchFeature):
    """A batch of B prompts: what a processor returns, for `model.segment(**inputs)`.

    Keys:
        prompts: The users' words, a list of B strings.
        frames: The B `CoordinateFrame`s.
        input_ids, attention_mask, mm_token_type_ids: The VLM's prompts, (B, L), padded on the left.
        pixel_values: Patches of the VLM's images of all prompts, (patches, d).
        image_grid_thw: Their patch grids, (images, 3): for each prompt the mosaic (if there are references), then
            the target.
        sam_pixel_values: SAM 3's input for the N different target images, (N, 3, S, S).
        image_index: Which of the N images each prompt is about, (B,).
        shortcut_pixel_values: SAM 3's input on the shortcut, (N, 3, S, S), where it differs (`shortcut_size`).
    """

    REQUIRED = (
        "prompts",
        "frames",
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
        "sam_pixel_values",
        "image_index",
    )
    OPTIONAL = ("shortcut_pixel_values",)

    @property
    def samples(self) -> list[PreparedSample]:
        """The prompts one by one, without padding; their tensors are views of the batch's.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if missing := [name for name in self.REQUIRED if name not in self]:
            raise ValueError(
                f"segment: the inputs lack {', '.join(missing)}; pass all that the processor returned."
            )
        if unknown := [name for name in self if name not in (*self.REQUIRED, *self.OPTIONAL)]:
            raise ValueError(
                f"segment: there is no argument {unknown[0]!r}; pass what the processor returned, or an argument of "
                "`segment`."
            )
        samples = []
        grids, patches = self["image_grid_thw"], self["pixel_values"]
        for row, (prompt, frame) in enumerate(zip(self["prompts"], self["frames"], strict=True)):
            tokens = self["attention_mask"][row].bool()
            images = 1 if frame.layout is None else 2
            own_grids, grids = grids[:images], grids[images:]
            count = int(own_grids.prod(dim=-1).sum())
            own_patches, patches = patches[:count], patches[count:]
            image = int(self["image_index"][row])
            shortcut = self.get("shortcut_pixel_values")
            samples.append(
                PreparedSample(
                    prompt=prompt,
                    frame=frame,
                    sam_pixel_values=self["sam_pixel_values"][image],
                    input_ids=self["input_ids"][row][tokens],
                    mm_token_type_ids=self["mm_token_type_ids"][row][tokens],
                    pixel_values=own_patches,
                    image_grid_thw=own_grids,
                    shortcut_pixel_values=None if shortcut is None else shortcut[image],
                )
            )
        return samples


def index_images(images: Sequence[object]) -> tuple[list[object], list[int]]:
    """The different ones of some images, and the index of each image among them.

    Two images are the same if they are one object, or equal paths.
    """
    different: list[object] = []
    index_of: dict[object, int] = {}
    indices = []
    for image in images:
        key = image if isinstance(image, str) else id(image)  # the list keeps the objects alive
        if key not in index_of:
            index_of[key] = len(different)
            different.append(image)
        indices.append(index_of[key])
    return different, indices


def known(value: _T | None, name: str) -> _T:
    """A part of a sample that may be missing.

    Raises:
        ValueError: If it is.
    """
    if value is None:
        raise ValueError(
            f"a sample has no {name}; give what the processor's `prepare` and `prepare_vlm` return."
        )
    return value
