"""Inference of CoPRS: one generation per prompt, whose concentration token gives prior and mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..completion import Completion
from ..devices import execution_device
from ..generation import generate_with_states
from ..inference import EMPTY_LOGIT, evaluating
from ..inputs import PreparedSample, known
from ..outputs import RawSegmentation
from ..router import ShortcutRouter
from ..shared_references import ReferenceStore
from ..streaming import TextPieces
from .completion import REF_POS
from .processing_coprs import CoPRSProcessor
from .sam_decoder import PriorFeatures

if TYPE_CHECKING:
    from .modeling_coprs import CoPRSForSegmentation

REASON = "CoPRS reasons about every prompt"
NO_POSITION = f"the completion has no {REF_POS}"
ROUTE_REASONS = (REASON, NO_POSITION)
"""`ConceptSegmentation.route_reason` of results of CoPRS."""

ROUTERS = ("adaptive", "full_reasoning")
"""Router modes that CoPRS accepts; both always reason."""

_CONCEPTSEG_OPTIONS = {"concept": None, "rule": None, "sam_prompt": "concept+text"}


def check_options(router: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `segment` without those of ConceptSeg at their default.

    Raises:
        ValueError: If the router excludes reasoning, or another option of ConceptSeg is set.
    """
    check_router(router)
    for name, default in _CONCEPTSEG_OPTIONS.items():
        if options.get(name, default) != default:
            raise ValueError(f"segment: {name} is an option of ConceptSeg that CoPRS does not have; omit it.")
    return {name: value for name, value in options.items() if name not in _CONCEPTSEG_OPTIONS}


def check_router(router: Any) -> None:
    """Check that a router mode, or a `ShortcutRouter`, does not exclude reasoning.

    Raises:
        ValueError: If it does.
    """
    mode = router.mode if isinstance(router, ShortcutRouter) else router
    if mode not in ROUTERS:
        raise ValueError(f"segment: router is {mode!r}, but CoPRS always reasons; use 'full_reasoning'.")


class PriorSegmenter:
    """Segment batches of prepared samples with one model, processor and generation settings.

    With `on_text`, which receives the text of the VLM while it is written, a batch has at most one sample.
    """

    def __init__(
        self,
        model: CoPRSForSegmentation,
        processor: CoPRSProcessor,
        generation_config: GenerationConfig | Mapping[str, Any] | None,
        references: ReferenceStore,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.processor, self.references, self.on_text = model, processor, references, on_text
        processor.check_family(model.config)
        self.generation_config = ending_with_position(model, generation_config)

    def segment(
        self, samples: Sequence[PreparedSample], image_index: Sequence[int] | None = None
    ) -> list[RawSegmentation]:
        """Return one output per sample, in the order of the samples; samples with an error yield failed outputs."""
        image_of = range(len(samples)) if image_index is None else image_index
        valid = [i for i, sample in enumerate(samples) if sample.error is None]
        outputs: dict[int, RawSegmentation] = {}
        if valid:
            with evaluating(self.model) if self.model.training else nullcontext():
                outputs = self._reason(samples, valid, image_of)
        return [
            outputs.get(i) or RawSegmentation(sample.prompt, error=sample.error or "")
            for i, sample in enumerate(samples)
        ]

    def _reason(
        self, samples: Sequence[PreparedSample], indices: Sequence[int], image_of: Sequence[int]
    ) -> dict[int, RawSegmentation]:
        completions, states, has_position = self._complete([samples[i] for i in indices])
        features = self._encode(samples, indices, image_of)
        sizes = [self.processor.valid_size(samples[i].coordinates.image_size) for i in indices]
        prior = self.model.compute_prior(states, features, torch.tensor(sizes))
        masks = self.model.decode_masks(features, prior)
        outputs = {}
        for row, (i, size) in enumerate(zip(indices, sizes, strict=True)):
            sample, found = samples[i], bool(has_position[row])
            empty = torch.full((1, 1), EMPTY_LOGIT)
            outputs[i] = RawSegmentation(
                prompt=sample.prompt,
                frame=sample.coordinates,
                mask_logits=self._without_padding(masks[row], size) if found else empty,
                prior_logits=self._without_padding(prior[row], size) if found else empty,
                completion=completions[row],
                reason=REASON if found else NO_POSITION,
            )
        return outputs

    def _complete(self, samples: Sequence[PreparedSample]) -> tuple[list[Completion], Tensor, Tensor]:
        """Generate one completion per sample.

        Returns:
            The completions, the (B, C) hidden states of their concentration tokens from the same pass, and (B,) bool,
            whether there is one.
        """
        model = self.model
        pieces = None if self.on_text is None else TextPieces(self.processor.decode_text, self.on_text)
        generated = generate_with_states(
            model.vlm,
            self.processor.collate(samples, device=execution_device(model.vlm)),
            self.generation_config,
            end_of_turn_state=True,  # the concentration token ends the completion
            references=self.references,
            on_tokens=None if pieces is None else pieces.update,
        )
        if len(generated.mask) != len(samples):
            raise ValueError(
                "segment: num_return_sequences is above 1, but each sample has one result; set it to 1."
            )
        completions = [
            self.processor.decode_completion(token_ids[mask])
            for token_ids, mask in zip(generated.token_ids, generated.state_mask, strict=True)
        ]
        if pieces is not None:
            pieces.finish(completions[0].text)
        states, has_position = model.concentration_states(
            generated.hidden_states, generated.token_ids, generated.state_mask
        )
        return completions, states, has_position

    def _encode(
        self, samples: Sequence[PreparedSample], indices: Sequence[int], image_of: Sequence[int]
    ) -> PriorFeatures:
        """Encode each image once; return one row of features per index."""
        rows: dict[int, int] = {}
        pixels: list[Tensor] = []
        for i in indices:
            if image_of[i] not in rows:
                rows[image_of[i]] = len(pixels)
                pixels.append(known(samples[i].sam_pixel_values, "sam_pixel_values"))
        device = execution_device(self.model.sam)
        features = self.model.encode_image(torch.stack([tensor.to(device) for tensor in pixels]))
        return features.select(torch.tensor([rows[image_of[i]] for i in indices]))

    def _without_padding(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (1, H, W) logits of SAM's input for the (height, width) that the image has in it."""
        side = self.model.config.sam_image_size
        if size == (side, side):
            return logits[0].float()
        resized = nn.functional.interpolate(logits[None].float(), size=(side, side), mode="bilinear")
        return resized[0, 0, : size[0], : size[1]].clone()


def ending_with_position(
    model: CoPRSForSegmentation, generation_config: GenerationConfig | Mapping[str, Any] | None
) -> GenerationConfig | dict[str, Any]:
    """Return generation settings with which `<REF_POS>` ends a completion, so that it occurs at most once."""
    position = model.config.ref_pos_token_id
    is_config = isinstance(generation_config, GenerationConfig)
    given: Any = generation_config
    options = {} if given is None or is_config else dict(given)
    ends = given.eos_token_id if is_config else options.get("eos_token_id")
    if ends is None:
        ends = model.vlm.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = list(dict.fromkeys([*ends, position]))
    if is_config:
        config = copy.deepcopy(given)
        config.eos_token_id = ends
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = model.config.max_new_tokens
        return config
    options["eos_token_id"] = ends
    if options.get("max_new_tokens") is None and options.get("max_length") is None:
        options["max_new_tokens"] = model.config.max_new_tokens
    return options
