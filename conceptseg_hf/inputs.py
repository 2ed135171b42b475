"""Inputs of `ConceptSegForSegmentation.segment`, created by `ConceptSegProcessor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import BatchFeature

from .coordinates import CoordinateFrame

_T = TypeVar("_T")


@dataclass(frozen=True)
class PreparedTarget:
    """A target image shared by one or more prompts: its size, and the inputs of the VLM and SAM 3."""

    size: tuple[int, int]
    canvas: Image.Image
    sam_pixels: torch.Tensor
    shortcut_pixels: torch.Tensor | None


@dataclass(eq=False)
class PreparedSample:
    """A prepared prompt. The VLM's tensors are None until the processor's `prepare_vlm` is called.

    Attributes:
        prompt: The user's prompt.
        frame: The sample's coordinate frame.
        sam_pixel_values: SAM 3's input, (3, S, S).
        vlm_images: The VLM's images at canvas size: the mosaic (if there are references), then the target.
        vlm_text: The chat text, with one image token per image.
        input_ids: Token ids of the chat, image tokens expanded, (L,).
        mm_token_type_ids: 1 at image tokens, else 0, (L,).
        pixel_values: Patches of all images, (patches, d), or images of one size, (images, 3, S, S).
        image_grid_thw: Patch grid of each image, (images, 3); None for images of one size.
        error: None, or one sentence that states why the sample cannot be segmented; all tensors are None in this case.
        shortcut_pixel_values: SAM 3's input on the shortcut, (3, S, S), if the processor's `shortcut_size` is set, else
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
        """The sample's coordinate frame.

        Raises:
            ValueError: If the sample could not be prepared.
        """
        return known(self.frame, "coordinate frame")

    @classmethod
    def failed(cls, prompt: str, error: str) -> PreparedSample:
        """Create a placeholder for an item that could not be prepared."""
        return cls(prompt=prompt, error=error)


class ConceptSegInputs(BatchFeature):
    """A batch of B prompts, returned by the processor for `model.segment(**inputs)`.

    Keys:
        prompts: The user prompts, a list of B strings.
        frames: The B `CoordinateFrame`s.
        input_ids, attention_mask, mm_token_type_ids: The VLM's prompts, (B, L), padded on the left.
        pixel_values: The VLM's images of all prompts: for each prompt the mosaic (if there are references), then the
            target. Patches, (patches, d), or images of one size, (images, 3, S, S).
        image_grid_thw: Patch grids of these images, (images, 3); only present with patches.
        sam_pixel_values: SAM 3's input for the N unique target images, (N, 3, S, S).
        image_index: Index of each prompt's target among the N images, (B,).
        shortcut_pixel_values: SAM 3's input on the shortcut, (N, 3, S, S); present only if the processor's
            `shortcut_size` is set.
    """

    REQUIRED = (
        "prompts",
        "frames",
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "sam_pixel_values",
        "image_index",
    )
    OPTIONAL = ("image_grid_thw", "shortcut_pixel_values")

    @property
    def samples(self) -> list[PreparedSample]:
        """The individual samples, without padding; their tensors are views of the batch.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if missing := [name for name in self.REQUIRED if name not in self]:
            raise ValueError(
                f"segment: the inputs lack {', '.join(missing)}; pass the processor's complete output."
            )
        if unknown := [name for name in self if name not in (*self.REQUIRED, *self.OPTIONAL)]:
            raise ValueError(
                f"segment: unknown argument {unknown[0]!r}; use items of the processor's output, or segment arguments."
            )
        samples = []
        grids, patches = self.get("image_grid_thw"), self["pixel_values"]
        shortcut = self.get("shortcut_pixel_values")
        for row, (prompt, frame) in enumerate(zip(self["prompts"], self["frames"], strict=True)):
            tokens = self["attention_mask"][row].bool()
            images = 1 if frame.layout is None else 2
            sample_grids, count = None, images
            if grids is not None:
                sample_grids, grids = grids[:images], grids[images:]
                count = int(sample_grids.prod(dim=-1).sum())
            sample_patches, patches = patches[:count], patches[count:]
            image = int(self["image_index"][row])
            samples.append(
                PreparedSample(
                    prompt=prompt,
                    frame=frame,
                    sam_pixel_values=self["sam_pixel_values"][image],
                    input_ids=self["input_ids"][row][tokens],
                    mm_token_type_ids=self["mm_token_type_ids"][row][tokens],
                    pixel_values=sample_patches,
                    image_grid_thw=sample_grids,
                    shortcut_pixel_values=None if shortcut is None else shortcut[image],
                )
            )
        return samples


def index_images(images: Sequence[object]) -> tuple[list[object], list[int]]:
    """Return the unique images, and the index of each image among them.

    Images are considered equal if they are the same object or equal paths.
    """
    unique: list[object] = []
    index_of: dict[object, int] = {}
    indices = []
    for image in images:
        key = (
            image if isinstance(image, str) else id(image)
        )  # ids are unique because the list keeps the objects alive
        if key not in index_of:
            index_of[key] = len(unique)
            unique.append(image)
        indices.append(index_of[key])
    return unique, indices


def known(value: _T | None, name: str) -> _T:
    """Return an optional value of a sample, called `name` in the error message.

    Raises:
        ValueError: If the value is None.
    """
    if value is None:
        raise ValueError(
            f"a sample has no {name}; pass samples returned by the processor's `prepare` and `prepare_vlm`."
        )
    return value


def given_samples(
    inputs: ConceptSegInputs | Sequence[PreparedSample] | None, tensors: Mapping[str, Any]
) -> tuple[list[PreparedSample], list[int] | None]:
    """Return the samples of the arguments of `segment`, and the index of the image of each sample if it is known.

    Raises:
        ValueError: If the arguments are incomplete or contradictory.
    """
    if (inputs is None) == (not tensors):
        raise ValueError(
            "segment: pass either the processor's output as inputs or its items as keyword arguments, not both."
        )
    given = tensors if inputs is None else inputs
    if not isinstance(given, Mapping):
        return list(given), None
    batch = ConceptSegInputs(dict(given))
    return batch.samples, batch["image_index"].tolist()
