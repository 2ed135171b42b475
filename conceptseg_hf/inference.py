"""Inference: prepared samples through router, VLM, CTM and SAM 3. `ConceptSegForSegmentation.segment` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .completion import Completion
from .devices import execution_device
from .generation import generate_with_states
from .inputs import PreparedSample
from .outputs import RawSegmentation
from .processing_conceptseg import ConceptSegProcessor
from .router import ShortcutRouter
from .sam_prompt import BOX_TEXT, SAM_PROMPTS, ImageFeatures

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation

_EMPTY = -100.0  # a mask logit whose probability is 0


@dataclass(frozen=True)
class SegmentSettings:
    """How samples are segmented; see `ConceptSegForSegmentation.segment`.

    Raises:
        ValueError: If `prompted_by` is unknown.
    """

    router: ShortcutRouter
    generation_config: GenerationConfig | Mapping[str, Any] | None = None
    prompted_by: str = "concept+text"

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

    def segment(
        self, samples: Sequence[PreparedSample], image_index: Sequence[int] | None = None
    ) -> list[RawSegmentation]:
        """One output per sample, in their order; samples that carry an error become failed ones.

        Args:
            samples: The samples.
            image_index: Which image each of them is about; by default every sample has one of its own.
        """
        router = self.settings.router
        image_of = range(len(samples)) if image_index is None else image_index
        usable = [i for i, sample in enumerate(samples) if sample.error is None]
        asked = [i for i in usable if router.needs_first_pass(samples[i].prompt)]
        images = None
        if usable and all(samples[i].shortcut_pixel_values is None for i in usable):
            images = self._encode(samples, usable, image_of)  # both routes see the same pixels
        first_look: dict[int, _Decoded] = {}
        if asked:
            seen = images or self._encode(samples, asked, image_of, on_shortcut=True)
            texts = [router.sam_text(samples[i].prompt) for i in asked]
            first_look = self._decode(seen, asked, texts)
        decoded = {
            i: look for i, look in first_look.items() if router.accepts(look.presence, samples[i].prompt)
        }
        reasoned = [i for i in usable if i not in decoded]
        if reasoned:
            decoded |= self._reason(samples, reasoned, images or self._encode(samples, reasoned, image_of))
        return [self._output(sample, decoded.get(i), first_look.get(i)) for i, sample in enumerate(samples)]

    def _encode(
        self,
        samples: Sequence[PreparedSample],
        indices: Sequence[int],
        image_of: Sequence[int],
        on_shortcut: bool = False,
    ) -> _Images:
        """Encodes the images of some samples, each image once."""
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
            if image_of[i] not in rows:
                rows[image_of[i]] = len(pixels)
                pixels.append(tensor)
            row_of[i] = rows[image_of[i]]
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
                self.model.config.sam_text_prompt(completion.answer, samples[i].prompt)
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
        decoded = {i: _Decoded(torch.full((1, 1), _EMPTY), 0.0) for i in completions}
        if boxes:
            centers = torch.tensor(list(boxes.values()))[:, None]
            decoded |= self._decode(images, list(boxes), [BOX_TEXT] * len(boxes), boxes=centers)
        return decoded

    def _output(
        self, sample: PreparedSample, decoded: _Decoded | None, first_look: _Decoded | None
    ) -> RawSegmentation:
        if decoded is None:
            return RawSegmentation(sample.prompt, error=sample.error or "")
        return RawSegmentation(
            prompt=sample.prompt,
            threshold=self.settings.router.threshold(sample.prompt),
            frame=sample.coordinates,
            mask_logits=decoded.mask_logits,
            decode_presence=decoded.presence,
            presence=None if first_look is None else first_look.presence,
            completion=decoded.completion,
        )
