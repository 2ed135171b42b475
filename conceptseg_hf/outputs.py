"""Model outputs: tensors in training, and one result per image and prompt in inference."""

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
        loss: Scalar L_seg (eq. 5), returned if mask labels are given.
        mask_logits: (B, 1, h, w) SAM 3's semantic segmentation logits, returned if images for SAM 3 are given.
        presence_logits: (B, 1) logits of the presence of the concept in the image, returned with `mask_logits`.
        concept_embeds: (B, L2, D) concept tokens Z (eq. 3).
        logits: (B, L, V) the VLM's next-token logits, returned if `output_logits=True`.
        dice_loss: Scalar dice term of `loss`.
        focal_loss: Scalar focal term of `loss`.
        past_key_values: The VLM's key-value cache, returned if `use_cache=True`.
        hidden_states: (B, L, C) embeddings and hidden states of each VLM layer, the last one post-norm; returned if
            `output_hidden_states=True`.
        attentions: (B, heads, L, L) attention weights of each VLM layer, returned if `output_attentions=True`.
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
    """Segmentation result of one prompt on one image.

    Attributes:
        mask: "L" image of 0 and 255 at the input image's size; None if the item failed.
        label: The VLM's answer; the prompt on the shortcut or if the VLM gave no answer.
        score: Presence of the final decoding (1 for CoPRS) times the mean probability of the mask's pixels, in [0, 1];
            0 for an empty mask.
        route: "shortcut" (SAM 3 alone), "concept" (SAM 3 alone with a `ConceptPrompt`), "rule" (the VLM applied a given
            rule) or "reasoning"; None if the item failed.
        route_reason: Why this route was taken, as a short phrase; None if the item failed.
        presence: Presence of the prompt in SAM 3's first pass, in [0, 1]; None if there was no first pass.
        threshold: Minimum `presence` for the shortcut (eq. 9).
        decode_presence: Presence of the decoding that produced the mask, in [0, 1]; low if the concept is absent from
            the image. None for CoPRS, which does not predict it.
        think: The VLM's reasoning; None on the shortcut or if missing.
        rule: The rule induced by the VLM; None on the shortcut or if missing.
        answer: The noun phrase answered by the VLM; None on the shortcut or if missing.
        completion: The VLM's complete output text; None on the shortcut.
        box: The VLM's box (x1, y1, x2, y2) in pixels of the input image.
        check: The VLM's check box, in pixels of the reference that contains its center.
        check_reference: Index of that reference.
        check_iou: IoU of `check` with the withheld box (0 if the check is missing); None without a proxy query, and for
            CoPRS.
        heatmap: (H, W) float32 probabilities at the input image's size, returned if `return_heatmap=True`: of the mask,
            or for CoPRS of the positional prior.
        error: None, or one sentence that states why the item failed.
        mask_logits: (h, w) float32 mask logits of SAM 3 at their original resolution, returned if
            `return_logits=True`.
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
    route_reason: str | None = None

    @classmethod
    def failed(cls, error: str, label: str = "") -> ConceptSegmentation:
        """Create the result of a failed item; `error` is one sentence, `label` the prompt."""
        return cls(mask=None, label=label, score=0.0, error=error)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dictionary; `mask_logits` is omitted if it is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mask_logits is None:
            del values["mask_logits"]
        return values


@dataclass
class RawSegmentation:
    """The model's output for one prompt, before the processor's `post_process_concept_segmentation`.

    Attributes:
        prompt: The user's prompt.
        threshold: Minimum `presence` for the shortcut (eq. 9); None if the item failed.
        frame: The sample's coordinate frame; None if the item failed.
        mask_logits: (h, w) mask logits of the final decoding; None if the item failed.
        decode_presence: Presence of the final decoding, in [0, 1]; None if the item failed, and for CoPRS.
        presence: Presence of the prompt in SAM 3's first pass, in [0, 1]; None if there was no first pass.
        completion: The VLM's completion; None on the shortcut.
        error: None, or one sentence that states why the item failed.
        reason: Why the sample took its route; None if the item failed.
        prior_logits: (h, w) logits of the positional prior of CoPRS; None for ConceptSeg.
        given_rule: The rule that the completion was started with; None if the VLM wrote it.
        phrase: Phrase of the concept that the mask was decoded from; None without a concept.
        concept_embeds: (L2, D) concept tokens Z of the completion; None on the shortcut and for CoPRS.
    """

    prompt: str
    threshold: float | None = None
    frame: CoordinateFrame | None = None
    mask_logits: Tensor | None = None
    decode_presence: float | None = None
    presence: float | None = None
    completion: Completion | None = None
    error: str | None = None
    phrase: str | None = None
    given_rule: str | None = None
    reason: str | None = None
    prior_logits: Tensor | None = None
    concept_embeds: Tensor | None = None

    @property
    def route(self) -> str:
        """The route of the result; see `ConceptSegmentation`."""
        if self.completion is not None:
            return "reasoning" if self.given_rule is None else "rule"
        return "shortcut" if self.phrase is None else "concept"


class SegmentationOutputs(Sequence[ConceptSegmentation]):
    """Output of `ConceptSegForSegmentation.segment` without a processor.

    A sequence of results that are post-processed on access, with the default arguments of the processor's
    `post_process_concept_segmentation`.

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
