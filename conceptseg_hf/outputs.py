"""What the model returns: tensors while training, one readable result per image and prompt otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from .boxes import Box
from .completion import Completion
from .coordinates import CoordinateFrame


@dataclass
class ConceptSegOutput(ModelOutput):
    """Output of `ConceptSegForSegmentation.forward`.

    Attributes:
        loss: Scalar L_seg (eq. 5); present when mask labels were given.
        mask_logits: (B, 1, h, w) SAM 3's semantic segmentation map; present when an image for SAM 3 was
            given.
        presence_logits: (B, 1) whether the concept is in the image; present with `mask_logits`.
        concept_embeds: (B, L2, D) concept tokens Z (eq. 3).
        logits: (B, L, V) the VLM's next-token logits; present when asked for.
        dice_loss: Scalar share of `loss`.
        focal_loss: Scalar share of `loss`.
        past_key_values: The VLM's key-value cache; present when asked for, as are the next two.
        hidden_states: (B, L, C) of the VLM's embeddings and of each of its layers; the last is post-norm.
        attentions: (B, heads, L, L) of each of the VLM's layers.
    """

    loss: Tensor | None = None
    mask_logits: Tensor | None = None
    presence_logits: Tensor | None = None
    concept_embeds: Tensor | None = None
    logits: Tensor | None = None
    dice_loss: Tensor | None = None
    focal_loss: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ConceptSegmentation:
    """The answer to one prompt on one image.

    Attributes:
        mask: "L" image of 0 and 255, of the input image's size; None when the item failed.
        label: The VLM's answer, or the prompt on the shortcut (and where the VLM gave no answer).
        score: In [0, 1]: presence of the final decode times the mean probability of the mask's pixels; 0 for
            an empty mask.
        route: "shortcut" or "reasoning"; None when the item failed.
        presence: Presence, in [0, 1], that SAM 3's first look assigns to the prompt; None when it was not
            asked.
        threshold: What `presence` had to reach for the shortcut (eq. 9).
        decode_presence: Presence, in [0, 1], of the decode that made the mask: low where the concept is not
            in the image.
        think: The VLM's reasoning; None on the shortcut or when missing.
        rule: The rule it induced; None on the shortcut or when missing.
        answer: The noun phrase it answered; None on the shortcut or when missing.
        completion: All of its raw text; None on the shortcut.
        box: Its box (x1, y1, x2, y2) in pixels of the input image.
        check: Its check box, in pixels of the reference image it points at.
        check_reference: Index of that reference.
        check_iou: IoU of `check` with the withheld box (0 when the check is missing); None without a proxy
            query.
        heatmap: (H, W) float32 mask probabilities at the input image's size; only when asked for.
        error: None, or one sentence saying why this item failed.
        mask_logits: (h, w) float32 SAM 3's mask logits at their own size; only when asked for.
    """

    mask: Image.Image | None
    label: str
    score: float
    route: str | None = None
    presence: float | None = None
    threshold: float | None = None
    decode_presence: float | None = None
    think: str | None = None
    rule: str | None = None
    answer: str | None = None
    completion: str | None = None
    box: Box | None = None
    check: Box | None = None
    check_reference: int | None = None
    check_iou: float | None = None
    heatmap: np.ndarray | None = None
    error: str | None = None
    mask_logits: np.ndarray | None = None

    @classmethod
    def failed(cls, error: str, label: str = "") -> ConceptSegmentation:
        """The result of an item that could not be processed; `error` is one sentence, `label` the prompt."""
        return cls(mask=None, label=label, score=0.0, error=error)

    def to_dict(self) -> dict[str, Any]:
        """The result as a dictionary: every attribute under its name, `mask_logits` only where there are any."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mask_logits is None:
            del values["mask_logits"]
        return values


@dataclass
class RawSegmentation:
    """The model's output for one prompt, before the processor's `post_process_concept_segmentation`.

    Attributes:
        prompt: The user's words.
        threshold: What `presence` had to reach for the shortcut (eq. 9); None when the item failed, as are the next
            three.
        frame: The sample's coordinate frames.
        mask_logits: (h, w) SAM 3's mask logits of the final decode.
        decode_presence: Presence, in [0, 1], of the final decode.
        presence: Presence, in [0, 1], that SAM 3's first look assigns to the prompt; None when it was not asked.
        completion: What the VLM wrote; None on the shortcut.
        error: None, or one sentence saying why this item failed.
    """

    prompt: str
    threshold: float | None = None
    frame: CoordinateFrame | None = None
    mask_logits: Tensor | None = None
    decode_presence: float | None = None
    presence: float | None = None
    completion: Completion | None = None
    error: str | None = None


class SegmentationOutputs(Sequence[ConceptSegmentation]):
    """What `ConceptSegForSegmentation.segment` returns without a processor.

    A sequence of results, each post-processed when it is read, as the processor's `post_process_concept_segmentation`
    does by default.

    Attributes:
        raw: One `RawSegmentation` per prompt.
    """

    def __init__(
        self, raw: Sequence[RawSegmentation], post_process: Callable[[RawSegmentation], ConceptSegmentation]
    ) -> None:
        self.raw = list(raw)
        self._post_process = post_process

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> ConceptSegmentation: ...

    @overload
    def __getitem__(self, index: slice) -> SegmentationOutputs: ...

    def __getitem__(self, index: int | slice) -> ConceptSegmentation | SegmentationOutputs:
        if isinstance(index, slice):
            return SegmentationOutputs(self.raw[index], self._post_process)
        return self._post_process(self.raw[index])

    def __iter__(self) -> Iterator[ConceptSegmentation]:
        return map(self._post_process, self.raw)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.raw!r})"
