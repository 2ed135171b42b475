"""What a processor makes of images, prompts and references, and `ConceptSegForSegmentation.segment` takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image

from .coordinates import CoordinateFrame

if TYPE_CHECKING:
    from .processing_conceptseg import ConceptSegProcessor

_T = TypeVar("_T")


@dataclass(eq=False)
class PreparedSample:
    """One prompt, ready for the model. The MLLM's tensors are None until the processor's `prepare_mllm`.

    Attributes:
        prompt: The user's words.
        frame: The sample's coordinate frames.
        sam_pixel_values: SAM 3's input, (3, S, S).
        mllm_images: What the MLLM sees, as pictures of canvas size: the mosaic (if there are references),
            then the target.
        mllm_text: The chat text, with one image token per picture.
        input_ids: Token ids of the chat, image tokens expanded, (L,).
        mm_token_type_ids: 1 at image tokens, else 0, (L,).
        pixel_values: Patches of all pictures, (patches, d).
        image_grid_thw: Patch grid of each picture, (pictures, 3).
        error: None, or one sentence that says why this sample cannot be segmented; all tensors are None then.
        shortcut_pixel_values: SAM 3's input on the shortcut, (3, S, S), where that is another one
            (`shortcut_size`); else None.
    """

    prompt: str
    frame: CoordinateFrame | None = None
    sam_pixel_values: torch.Tensor | None = None
    mllm_images: tuple[Image.Image, ...] = ()
    mllm_text: str = ""
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

    def to(self, device: torch.device | str) -> PreparedSample:
        """A copy whose tensors are on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(eq=False)
class ConceptSegInputs(Sequence):
    """What a processor returns and `model.segment` takes: samples of any size, and that processor."""

    samples: list[PreparedSample]
    processor: ConceptSegProcessor = field(repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice) -> Any:
        return replace(self, samples=self.samples[index]) if isinstance(index, slice) else self.samples[index]

    def __iter__(self) -> Iterator[PreparedSample]:
        return iter(self.samples)

    def to(self, device: torch.device | str) -> ConceptSegInputs:
        """A copy whose tensors are on `device`; samples that share SAM 3's input go on sharing it."""
        samples = [sample.to(device) for sample in self.samples]
        for name in ("sam_pixel_values", "shortcut_pixel_values"):
            shared: dict[int, torch.Tensor | None] = {}
            for before, after in zip(self.samples, samples, strict=True):
                setattr(after, name, shared.setdefault(id(getattr(before, name)), getattr(after, name)))
        return replace(self, samples=samples)


def known(value: _T | None, name: str) -> _T:
    """A part of a sample that may be missing.

    Raises:
        ValueError: If it is.
    """
    if value is None:
        raise ValueError(
            f"a sample has no {name}; give what the processor's `prepare` and `prepare_mllm` return."
        )
    return value
