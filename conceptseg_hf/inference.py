"""Inference: prepared samples through router, VLM, CTM and SAM 3. `ConceptSegForSegmentation.segment` runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .completion import Completion
from .devices import execution_device
from .finite import is_finite
from .generation import generate_with_states
from .outputs import ConceptSegmentation
from .processing_conceptseg import ConceptSegProcessor, PreparedSample
from .router import ShortcutRouter
from .sam_prompt import BOX_TEXT, SAM_PROMPTS, ImageFeatures

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation

_NOTHING = -100.0  # a mask logit whose probability is 0
_NOT_FINITE = (
    "the model's output for this sample is not finite (NaN); load the checkpoint in float32 or bfloat16, or use one "
    "whose training did not diverge."
)


@dataclass(frozen=True)
class SegmentSettings:
    """How samples are segmented; see `ConceptSegForSegmentation.segment`.

    Raises:
        ValueError: If `prompted_by` is unknown.
    """

    router: ShortcutRouter
    generation_config: GenerationConfig | Mapping[str, Any] | None = None
    prompted_by: str = "concept+text"
    return_heatmap: bool = False
    return_logits: bool = False

    def __post_init__(self) -> None:
        if self.prompted_by not in SAM_PROMPTS:
            raise ValueError(
                f"segment: sam_prompt is {self.prompted_by!r}; use one of {', '.join(map(repr, SAM_PROMPTS))}."
            )


@dataclass
class _Decoded:
    """One decode: (h, w) mask logits, presence in [0, 1], and the completion (None on the shortcut)."""

    mask_logits: Tensor
    presence: float
    completion: Completion | None = None

    @property
    def is_finite(self) -> bool:
        """Whether there is a mask in it at all."""
        return math.isfinite(self.presence) and is_finite(self.mask_logits)


@dataclass(frozen=True)
class _Images:
    """What SAM 3 sees of some samples: features of N images, and the row of each sample in them."""

    features: ImageFeatures
    row_of: Mapping[int, int]

    def select(self, indices: Sequence[int]) -> ImageFeatures:
        """Features of samples, by their index."""
        return self.features.select(torch.tensor([self.row_of[i] for i in indices]))


class Segmenter:
    """Segments batches of prepared samples with one model, processor and settings.

    Every image is encoded once by SAM 3, and only samples that do not take the shortcut reach the VLM.
    """

    def __init__(
        self, model: ConceptSegForSegmentation, processor: ConceptSegProcessor, settings: SegmentSettings
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings

    def segment(self, samples: Sequence[PreparedSample]) -> list[ConceptSegmentation]:
        """One result per sample, in their order; samples that carry an error become failed results."""
        router = self.settings.router
        usable = [i for i, sample in enumerate(samples) if sample.error is None]
        asked = [i for i in usable if router.asks_sam(samples[i].prompt)]
        images = None
        if usable and all(samples[i].shortcut_pixel_values is None for i in usable):
            images = self._encode(samples, usable)  # both routes see the same pixels
        first_look: dict[int, _Decoded] = {}
        if asked:
            seen = images or self._encode(samples, asked, on_shortcut=True)
            texts = [router.sam_text(samples[i].prompt) for i in asked]
            first_look = self._decode(seen, asked, texts)
        decoded = {
            i: look for i, look in first_look.items() if router.accepts(look.presence, samples[i].prompt)
        }
        reasoned = [i for i in usable if i not in decoded]
        if reasoned:
            decoded |= self._reason(samples, reasoned, images or self._encode(samples, reasoned))
        return [self._result(sample, decoded.get(i), first_look.get(i)) for i, sample in enumerate(samples)]

    def _encode(
        self, samples: Sequence[PreparedSample], indices: Sequence[int], on_shortcut: bool = False
    ) -> _Images:
        """Encodes the images of some samples; an image that samples share, once."""
        rows: dict[int, int] = {}
        pixels: list[Tensor] = []
        row_of: dict[int, int] = {}
        for i in indices:
            own, shortcut = samples[i].sam_pixel_values, samples[i].shortcut_pixel_values
            tensor = shortcut if on_shortcut and shortcut is not None else own
            if tensor is None:
                raise ValueError(
                    "segment: a sample has no sam_pixel_values; give what the processor returned."
                )
            if id(tensor) not in rows:
                rows[id(tensor)] = len(pixels)
                pixels.append(tensor)
            row_of[i] = rows[id(tensor)]
        device = execution_device(self.model.sam)
        return _Images(self.model.encode_image(torch.stack([tensor.to(device) for tensor in pixels])), row_of)

    def _decode(
        self,
        images: _Images,
        indices: Sequence[int],
        texts: list[str] | None,
        concept_embeds: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> dict[int, _Decoded]:
        """Decodes one prompt for each of some samples; by their index."""
        ids, mask = (None, None) if texts is None else self.processor.sam_text(texts)
        mask_logits, presence_logits = self.model.decode_masks(
            images.select(indices), ids, mask, concept_embeds, boxes
        )
        presences = presence_logits.float().sigmoid()[:, 0].tolist()
        return {
            i: _Decoded(mask_logits[row, 0].float(), presence)
            for row, (i, presence) in enumerate(zip(indices, presences))
        }

    def _reason(
        self, samples: Sequence[PreparedSample], indices: Sequence[int], images: _Images
    ) -> dict[int, _Decoded]:
        """Lets the VLM write about some samples, and SAM 3 decode what it says; by their index."""
        completions, concepts = self._complete([samples[i] for i in indices])
        by_index = dict(zip(indices, completions))
        prompted_by = self.settings.prompted_by
        if prompted_by == "box":
            decoded = self._decode_boxes(images, samples, by_index)
        else:
            texts = [
                self.model.config.sam_words(completion.answer, samples[i].prompt)
                for i, completion in by_index.items()
            ]
            decoded = self._decode(
                images,
                indices,
                None if prompted_by == "concept" else texts,
                None if prompted_by == "text" else concepts,
            )
        for i, completion in by_index.items():
            decoded[i].completion = completion
        return decoded

    def _complete(self, samples: Sequence[PreparedSample]) -> tuple[list[Completion], Tensor]:
        """What the VLM writes, and (B, L2, D) concept tokens.

        Raises:
            ValueError: If it is asked for several completions of a sample.
        """
        config = self.model.config
        generated = generate_with_states(
            self.model.vlm,
            self.processor.collate(samples, device=execution_device(self.model.vlm)),
            self.settings.generation_config,
            config.hidden_states_at,
            config.end_of_turn_state,
            config.max_total_length,
        )
        if len(generated.mask) != len(samples):
            raise ValueError(
                "segment: num_return_sequences is above 1; a sample has one result, so leave it at 1."
            )
        completions = [
            self.processor.decode_completion(token_ids[mask], sample)
            for token_ids, mask, sample in zip(generated.token_ids, generated.mask, samples)
        ]
        device = execution_device(self.model.ctm)
        return completions, self.model.encode_concepts(
            generated.hidden_states.to(device), generated.state_mask.to(device)
        )

    def _decode_boxes(
        self, images: _Images, samples: Sequence[PreparedSample], completions: Mapping[int, Completion]
    ) -> dict[int, _Decoded]:
        """Decodes the box of each completion, and nothing where there is none."""
        boxes = {
            i: samples[i].coordinates.text_box_to_sam(completion.bbox)
            for i, completion in completions.items()
            if completion.bbox is not None
        }
        boxes = {i: box for i, box in boxes.items() if box[2] > 0 and box[3] > 0}
        decoded = {i: _Decoded(torch.full((1, 1), _NOTHING), 0.0) for i in completions}
        if boxes:
            centers = torch.tensor(list(boxes.values()))[:, None]
            decoded |= self._decode(images, list(boxes), [BOX_TEXT] * len(boxes), boxes=centers)
        return decoded

    def _result(
        self, sample: PreparedSample, decoded: _Decoded | None, first_look: _Decoded | None
    ) -> ConceptSegmentation:
        """Brings a decode back to the frames of the input images."""
        if decoded is None:
            return ConceptSegmentation.failed(sample.error or "", sample.prompt)
        if not decoded.is_finite:
            return ConceptSegmentation.failed(_NOT_FINITE, sample.prompt)
        mask, probability = self.processor.post_process_mask(decoded.mask_logits, sample.coordinates)
        foreground = probability[probability > 0.5]
        completion = decoded.completion
        result = ConceptSegmentation(
            mask=mask,
            label=sample.prompt,
            score=decoded.presence * float(foreground.mean()) if foreground.size else 0.0,
            route="shortcut" if completion is None else "reasoning",
            presence=None if first_look is None else first_look.presence,
            threshold=self.settings.router.threshold(sample.prompt),
            decode_presence=decoded.presence,
            heatmap=probability if self.settings.return_heatmap else None,
            mask_logits=decoded.mask_logits.cpu().numpy() if self.settings.return_logits else None,
        )
        return result if completion is None else self._with_completion(result, completion, sample)

    def _with_completion(
        self, result: ConceptSegmentation, completion: Completion, sample: PreparedSample
    ) -> ConceptSegmentation:
        result.label = completion.answer or sample.prompt
        result.think, result.rule, result.answer, result.completion = (
            completion.think,
            completion.rule,
            completion.answer,
            completion.text,
        )
        frame = sample.coordinates
        if completion.bbox is not None:
            result.box = frame.text_box_to_image(completion.bbox)
        if completion.check is not None:
            result.check_reference, result.check = frame.text_box_to_reference(completion.check)
        result.check_iou = frame.check_iou(completion.check)
        return result
