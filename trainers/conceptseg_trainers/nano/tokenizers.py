"""The words and templates of the nano model, and its processor."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.presets import (
    NANO_IMAGE_SIZE,
    NANO_SAM_TEXT_LENGTH,
    NANO_SAM_VOCABULARY_SIZE,
    NANO_VLM_VOCABULARY_SIZE,
)
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.prompt_processing import PromptProcessor
from conceptseg_hf.prompt_template import PromptTemplate
from conceptseg_hf.vlm_families import DEFAULT_FAMILY

from ..from_scratch import tokenizers

ProcessorT = TypeVar("ProcessorT", bound=PromptProcessor)

# Words of noun phrases; they come first in the vocabularies.
NOUN_WORDS = (
    *(*COLORS, GREY, *SHAPES, *TEXTURES),
    *"object glass transparent hidden shadow core scratch stain hole lesion visual".split(),
)
OTHER_WORDS = tuple(
    "a above among and another are as asks background before below blends box boxes breaks broken but by "
    "camouflaged can changes check dark darker defect differs each eye find first for frame from goes ground has "
    "healthy here image images in industrial inside into is it its largest last left light locate mark marked new "
    "no none not objects odd of on one ones others out part passes pattern reference references region regular "
    "right rule salient same see segmentation share shared shares show shows smallest stands target that the their "
    "there this through tissue to tone unlike user view was what where which with without "
    "bottom color farthest highest leftmost less lowest nearest only outside rightmost second so third top".split()
)

_WORDS = tuple(dict.fromkeys([*NOUN_WORDS, *OTHER_WORDS]))

NANO_TEMPLATE = PromptTemplate(
    system="locate",
    with_proxy="boxes {reference_boxes} check find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)
SHORT_TEMPLATE = PromptTemplate(
    system="show",
    with_proxy="boxes {reference_boxes} find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)
"""Template for completions without rule and check, as in the ablation without meta reasoning."""


def build_vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Build the VLM's tokenizer."""
    return tokenizers.build_vlm_tokenizer(_WORDS, NANO_VLM_VOCABULARY_SIZE)


def build_sam_tokenizer() -> PreTrainedTokenizerFast:
    """Build SAM 3's tokenizer."""
    return tokenizers.build_sam_tokenizer(_WORDS, NANO_SAM_VOCABULARY_SIZE, NANO_SAM_TEXT_LENGTH)


def build_processor(vlm_family: str = DEFAULT_FAMILY) -> ConceptSegProcessor:
    """Build the processor: canvas and SAM 3 input of 128 pixels, coordinates from 0 to 100."""
    return tokenizers.build_processor(
        build_vlm_tokenizer(),
        build_sam_tokenizer(),
        NANO_IMAGE_SIZE,
        NANO_TEMPLATE,
        vlm_family=vlm_family,
    )


def short_processor(processor: ProcessorT) -> ProcessorT:
    """Return a copy of a processor with the template for completions without rule and check."""
    return processor.with_settings(prompt_template=SHORT_TEMPLATE.to_dict())
