"""The words and templates of the mini model, and its processor."""

from __future__ import annotations

from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.presets import (
    MINI_IMAGE_SIZE,
    MINI_PATCH_SIZE,
    MINI_SAM_TEXT_LENGTH,
    MINI_SAM_VOCABULARY_SIZE,
    MINI_VLM_VOCABULARY_SIZE,
)
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor

from ..from_scratch.tokenizers import build_processor, build_sam_tokenizer, build_vlm_tokenizer
from ..nano.tokenizers import NANO_TEMPLATE
from ..nano.tokenizers import NOUN_WORDS as SHAPE_NOUN_WORDS
from ..nano.tokenizers import OTHER_WORDS as SHAPE_OTHER_WORDS
from .nouns import PHOTO_NOUNS, PROMPTS_WITHOUT_NOUN

SHAPE_WORDS = (
    *COLORS,
    GREY,
    *SHAPES,
    *TEXTURES,
    "glass",
    "transparent",
    "hidden",
    "shadow",
    "core",
    "scratch",
    "stain",
)
"""Words of the objects of ConceptShapes."""

_OTHER_WORDS = tuple(
    "again alike all already animal are be beside between both breast buildings by cannot changed colon colors common "
    "compared cracks defects different dots earlier example few first fourth frame from glass has have image in is "
    "kind lesions like lies looks many marks middle more moved near next no not now object objects of on only open "
    "or other others over part parts photograph picture pictures place plants people polyps region regions right row "
    "scene shows side skin small so stands steel street such surface surroundings that the them there these they thing "
    "things this those tile to two tumor two under used very was which white who with without yellow melanocytic below "
    "above left between street x y".split()
)
_NOUN_WORDS = tuple(word for noun in PHOTO_NOUNS for word in noun.split())
_PROMPT_WORDS = tuple(word for prompt in PROMPTS_WITHOUT_NOUN for word in prompt.split())
_WORDS = tuple(
    dict.fromkeys([*SHAPE_NOUN_WORDS, *_NOUN_WORDS, *SHAPE_OTHER_WORDS, *_PROMPT_WORDS, *_OTHER_WORDS])
)


def mini_processor() -> ConceptSegProcessor:
    """Build the processor: canvas and SAM 3 input of 224 pixels, coordinates from 0 to 100."""
    return build_processor(
        build_vlm_tokenizer(_WORDS, MINI_VLM_VOCABULARY_SIZE),
        build_sam_tokenizer(_WORDS, MINI_SAM_VOCABULARY_SIZE, MINI_SAM_TEXT_LENGTH),
        MINI_IMAGE_SIZE,
        NANO_TEMPLATE,
        patch_size=MINI_PATCH_SIZE,
    )
