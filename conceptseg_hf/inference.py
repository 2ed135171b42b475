"""Inference on prepared samples with router, VLM, CTM and SAM 3; see `ConceptSegForSegmentation.segment`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .boxes import Box
from .completion import Completion
from .concept_prompt import ConceptPrompt
from .devices import execution_device
from .generation import generate_with_states
from .inputs import PreparedSample, known
from .outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs
from .processing_conceptseg import ConceptSegProcessor
from .router import ShortcutRouter
from .sam_prompt import BOX_TEXT, SAM_PROMPTS, ImageFeatures
from .streaming import TextPieces

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation

EMPTY_LOGIT = -100.0  # mask logit of probability 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode within the context, then restore the previous mode of each module."""
    if not any(module.training for module in model.modules()):
        yield  # setting the modes takes longer than reading them
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class SegmentSettings:
    """Settings of `Segmenter`; see `ConceptSegForSegmentation.segment`.

    Raises:
        ValueError: If `prompted_by` is unknown.
    """

    router: ShortcutRouter
    generation_config: GenerationConfig | Mapping[str, Any] | None = None
    prompted_by: str = "concept+text"
    concept: ConceptPrompt | None = None
    rule: str | None = None

    @property
    def given_rule(self) -> str | None:
        """The rule that completions start with: the user's, or the verified one of the concept."""
        if self.rule is None and self.router.mode == "adaptive" and self.concept is not None:
            return self.concept.rule if self.concept.rule_is_reliable else None
        return self.rule

    def __post_init__(self) -> None:
        if self.prompted_by not in SAM_PROMPTS:
            raise ValueError(
                f"segment: sam_prompt is {self.prompted_by!r}; use one of {', '.join(map(repr, SAM_PROMPTS))}."
            )


@dataclass
class _Decoded:
    """Result of one decoding.

    Attributes:
        mask_logits: (h, w).
        presence: In [0, 1].
        completion: The completion of the VLM; None in a first pass.
        phrase: The phrase of a concept; None without a concept.
        concept_embeds: (L2, D) concept tokens of the completion; None in a first pass.
    """

    mask_logits: Tensor
    presence: float
    completion: Completion | None = None
    phrase: str | None = None
    concept_embeds: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the mask is empty."""
        return not bool((self.mask_logits > 0).any())


@dataclass(frozen=True)
class _Images:
    """SAM 3 features of N images, and the row of each sample in them."""

    features: ImageFeatures
    row_of: Mapping[int, int]

    def select(self, indices: Sequence[int]) -> ImageFeatures:
        """Return the features of the samples with the given indices."""
        return self.features.select(torch.tensor([self.row_of[i] for i in indices]))


def text_boxes_to_sam(
    samples: Sequence[PreparedSample], text_boxes: Mapping[int, Box | None]
) -> tuple[list[int], Tensor]:
    """Convert the boxes of completions to box prompts of SAM 3.

    Args:
        samples: The samples.
        text_boxes: Boxes in text units by index of the sample; None without a box.

    Returns:
        Indices of the N samples whose box has an area inside of the image.
        (N, 1, 4) boxes (center x, center y, width, height) in fractions of the image.
    """
    boxes = {
        i: samples[i].coordinates.text_box_to_sam(box) for i, box in text_boxes.items() if box is not None
    }
    boxes = {i: box for i, box in boxes.items() if min(box[2:]) > 0}
    return list(boxes), torch.tensor(list(boxes.values())).reshape(len(boxes), 1, 4)


class BatchSegmenter(Protocol):
    """Segments a batch of samples.

    Attributes:
        on_text: Receives the text of the VLM while it is written, from one sample at a time; or None.
    """

    on_text: Callable[[str], None] | None

    def segment(
        self, samples: Sequence[PreparedSample], image_index: Sequence[int] | None
    ) -> list[RawSegmentation]:
        """Return one output per sample."""
        ...


def segment_batches(
    segmenter: BatchSegmenter,
    samples: Sequence[PreparedSample],
    image_index: Sequence[int] | None,
    batch_size: int | None,
) -> list[RawSegmentation]:
    """Segment samples in batches.

    Args:
        segmenter: The segmenter.
        samples: The samples.
        image_index: Index of the image of each sample, if it is known.
        batch_size: Maximum number of samples per batch; None for all samples at once.

    Raises:
        ValueError: If `batch_size` is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            f"segment: batch_size is {batch_size}; use at least 1, or None for all samples at once."
        )
    size = 1 if segmenter.on_text is not None else batch_size or max(len(samples), 1)
    outputs = []
    for start in range(0, len(samples), size):
        batch = slice(start, start + size)
        outputs += segmenter.segment(samples[batch], None if image_index is None else image_index[batch])
    return outputs


def to_results(
    raw: Sequence[RawSegmentation],
    post_process: Callable[..., list[ConceptSegmentation]],
    is_final: bool,
    **options: bool,
) -> list[ConceptSegmentation] | SegmentationOutputs:
    """Post-process raw outputs.

    Args:
        raw: The outputs.
        post_process: `post_process_concept_segmentation` of the processor.
        is_final: Whether to return only the results; otherwise each is computed when it is read, and the raw outputs
            are available as well.
        **options: Options of `post_process`.
    """
    if is_final:
        return post_process(raw, **options)
    return SegmentationOutputs(raw, lambda output: post_process([output], **options)[0])


class Segmenter:
    """Segment batches of prepared samples with one model, processor and settings.

    SAM 3 encodes each image once, and the VLM processes only samples that do not take the shortcut. With `on_text`,
    which receives the text of the VLM while it is written, a batch has at most one sample.
    """

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        settings: SegmentSettings,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.references, self.on_text = model.reference_store, on_text
        processor.check_family(model.config)
        if settings.given_rule is not None:
            processor.check_rule(settings.given_rule)

    def segment(
        self, samples: Sequence[PreparedSample], image_index: Sequence[int] | None = None
    ) -> list[RawSegmentation]:
        """Return one output per sample, in the order of the samples; samples with an error yield failed outputs.

        Args:
            samples: The samples.
            image_index: Index of the image of each sample; by default, each sample has a separate image.
        """
        sam = self.model.sam
        # SAM 3 is in eval mode unless a user has changed it, and visiting all modules takes long for a small SAM 3.
        with evaluating(sam) if sam.training else nullcontext():
            return self._segment(samples, image_index)

    def _segment(
        self, samples: Sequence[PreparedSample], image_index: Sequence[int] | None
    ) -> list[RawSegmentation]:
        image_of = range(len(samples)) if image_index is None else image_index
        valid = [i for i, sample in enumerate(samples) if sample.error is None]
        candidates = [i for i in valid if self._needs_first_pass(samples[i])]
        images = None
        if valid and all(samples[i].shortcut_pixel_values is None for i in valid):
            images = self._encode(samples, valid, image_of)  # both routes use the same pixels
        first_pass: dict[int, _Decoded] = {}
        if candidates:
            shortcut_images = images or self._encode(samples, candidates, image_of, on_shortcut=True)
            first_pass = self._first_pass(shortcut_images, samples, candidates)
        decoded = {i: result for i, result in first_pass.items() if self._accepts(result, samples[i])}
        reasoning = [i for i in valid if i not in decoded]
        if reasoning:
            decoded |= self._reason(samples, reasoning, images or self._encode(samples, reasoning, image_of))
        return [self._output(sample, decoded.get(i), first_pass.get(i)) for i, sample in enumerate(samples)]

    def _needs_first_pass(self, sample: PreparedSample) -> bool:
        """Whether SAM 3 alone may answer; the adaptive router requires a concept that explains its references."""
        router, concept = self.settings.router, self.settings.concept
        if concept is None:
            return router.needs_first_pass(sample.prompt)
        return router.mode == "sam_only" or (router.mode == "adaptive" and concept.is_reliable)

    def _accepts(self, first_pass: _Decoded, sample: PreparedSample) -> bool:
        """Whether the mask of the first pass is the result.

        Beyond eq. 9, the adaptive router does not accept an empty mask of the user's words: SAM 3 contradicts itself
        where it is confident of the presence and segments nothing. The phrase of a concept is verified on references,
        so its empty masks mean that the image does not contain it.
        """
        if first_pass.presence < self._threshold(sample):
            return False
        is_checked = self.settings.concept is None and self.settings.router.mode == "adaptive"
        return not (is_checked and first_pass.is_empty)

    def _threshold(self, sample: PreparedSample) -> float:
        """Return the presence from which the mask of the first pass is accepted."""
        router, concept = self.settings.router, self.settings.concept
        if concept is None or router.mode != "adaptive":
            return router.threshold(sample.prompt)
        return concept.threshold if concept.is_reliable else 1.0

    def _first_pass(
        self, images: _Images, samples: Sequence[PreparedSample], indices: Sequence[int]
    ) -> dict[int, _Decoded]:
        """Decode the prompts, or the phrase of the concept with the highest presence in each image."""
        concept = self.settings.concept
        if concept is None:
            texts = [self.settings.router.sam_text(samples[i].prompt) for i in indices]
            return self._decode(images, indices, texts)
        tokens = concept.concept_embeds
        if tokens is not None:
            tokens = tokens[None].expand(len(indices), -1, -1)
        best: dict[int, _Decoded] = {}
        for phrase in concept.phrases or ("",):
            for i, result in self._decode(images, indices, [phrase] * len(indices), tokens).items():
                result.phrase = phrase
                if i not in best or result.presence > best[i].presence:
                    best[i] = result
        return best

    def _encode(
        self,
        samples: Sequence[PreparedSample],
        indices: Sequence[int],
        image_of: Sequence[int],
        on_shortcut: bool = False,
    ) -> _Images:
        """Encode the images of the samples with the given indices, each image once."""
        rows: dict[int, int] = {}
        pixels: list[Tensor] = []
        row_of: dict[int, int] = {}
        for i in indices:
            original, shortcut = samples[i].sam_pixel_values, samples[i].shortcut_pixel_values
            tensor = shortcut if on_shortcut and shortcut is not None else original
            if tensor is None:
                raise ValueError(
                    "segment: a sample has no sam_pixel_values; pass the samples as returned by the processor."
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
        """Decode one prompt per sample; results are keyed by sample index."""
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
        """Generate completions with the VLM and decode them with SAM 3; results are keyed by sample index."""
        with evaluating(self.model.vlm), evaluating(self.model.ctm):
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
        for (i, completion), tokens in zip(by_index.items(), concepts, strict=True):
            decoded[i].completion, decoded[i].concept_embeds = completion, tokens
        return decoded

    def _complete(self, samples: Sequence[PreparedSample]) -> tuple[list[Completion], Tensor]:
        """Generate one completion per sample; return the completions and their (B, L2, D) concept tokens.

        Raises:
            ValueError: If `num_return_sequences` is above 1.
        """
        config = self.model.config
        num_given = None
        started = list(samples)
        if (rule := self.settings.given_rule) is not None:
            starts = [
                self.processor.start_completion(self.processor.prepare_vlm(sample), rule)
                for sample in samples
            ]
            started, num_given = [sample for sample, _ in starts], [count for _, count in starts]
        pieces = self._text_pieces(started, num_given)
        if self.model.vlm_engine is not None and num_given is None:
            generated = self.model.vlm_engine.generate(
                self.model, self.processor, samples, self.settings.generation_config
            )
        else:  # completions that start with a rule are always written by Transformers
            generated = generate_with_states(
                self.model.vlm,
                self.processor.collate(started, device=execution_device(self.model.vlm)),
                self.settings.generation_config,
                config.hidden_states_at,
                config.end_of_turn_state,
                config.max_total_length,
                num_given,
                self.references,
                None if pieces is None else pieces.update,
            )
        if len(generated.mask) != len(samples):
            raise ValueError(
                "segment: num_return_sequences is above 1, but each sample has one result; set it to 1."
            )
        completions = [
            self.processor.decode_completion(token_ids[mask], sample)
            for token_ids, mask, sample in zip(generated.token_ids, generated.mask, samples)
        ]
        if pieces is not None:
            pieces.finish(completions[0].text)
        device = execution_device(self.model.ctm)
        return completions, self.model.encode_concepts(
            generated.hidden_states.to(device), generated.state_mask.to(device)
        )

    def _text_pieces(
        self, samples: Sequence[PreparedSample], num_given: Sequence[int] | None
    ) -> TextPieces | None:
        """Return the conversion of tokens to text for `on_text`; None if no text is requested."""
        if self.on_text is None:
            return None
        (sample,) = samples
        given = None
        if num_given is not None:
            ids = known(sample.input_ids, "input_ids")
            given = ids[len(ids) - num_given[0] :]
        return TextPieces(self.processor.decode_text, self.on_text, given)

    def _decode_boxes(
        self, images: _Images, samples: Sequence[PreparedSample], completions: Mapping[int, Completion]
    ) -> dict[int, _Decoded]:
        """Decode the box of each completion; completions without a box yield an empty mask."""
        decoded = {i: _Decoded(torch.full((1, 1), EMPTY_LOGIT), 0.0) for i in completions}
        text_boxes = {i: completion.bbox for i, completion in completions.items()}
        indices, boxes = text_boxes_to_sam(samples, text_boxes)
        if indices:
            decoded |= self._decode(images, indices, [BOX_TEXT] * len(indices), boxes=boxes)
        return decoded

    def _reason_of_route(self, sample: PreparedSample, decoded: _Decoded, first_pass: _Decoded | None) -> str:
        """Return why a sample took its route, as a short phrase."""
        router, concept = self.settings.router, self.settings.concept
        if router.mode != "adaptive":
            return f"router {router.mode!r}"
        if first_pass is not None:
            threshold = self._threshold(sample)
            reaches = first_pass.presence >= threshold
            compared = "reaches" if reaches else "is below"
            addition = "" if decoded is first_pass or not reaches else ", but the mask is empty"
            return f"presence {first_pass.presence:.2f} {compared} the threshold {threshold:.2f}{addition}"
        if concept is None:
            return "the prompt is too long for the shortcut"
        return "the concept is not verified" if concept.score is None else "the concept is not reliable"

    def _output(
        self, sample: PreparedSample, decoded: _Decoded | None, first_pass: _Decoded | None
    ) -> RawSegmentation:
        if decoded is None:
            return RawSegmentation(sample.prompt, error=sample.error or "")
        return RawSegmentation(
            prompt=sample.prompt,
            threshold=self._threshold(sample),
            frame=sample.coordinates,
            mask_logits=decoded.mask_logits,
            decode_presence=decoded.presence,
            presence=None if first_pass is None else first_pass.presence,
            completion=decoded.completion,
            given_rule=None if decoded.completion is None else self.settings.given_rule,
            reason=self._reason_of_route(sample, decoded, first_pass),
            phrase=decoded.phrase,
            concept_embeds=decoded.concept_embeds,
        )
