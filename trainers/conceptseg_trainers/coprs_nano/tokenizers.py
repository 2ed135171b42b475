"""The processor of coprs-nano: the tokenizer of nano with `<REF_POS>`."""

from __future__ import annotations

from transformers import Qwen2VLImageProcessor, Sam3ImageProcessor

from conceptseg_hf.coprs import CoPRSProcessor
from conceptseg_hf.presets import NANO_IMAGE_SIZE
from conceptseg_hf.prompt_template import PromptTemplate

from ..from_scratch.tokenizers import COORDINATE_SCALE
from ..nano.tokenizers import build_vlm_tokenizer

COPRS_NANO_TEMPLATE = PromptTemplate(
    system="mark",
    with_proxy="boxes {reference_boxes} find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)


def build_processor() -> CoPRSProcessor:
    """Build the processor: images of 128 pixels for the VLM and SAM, coordinates from 0 to 100."""
    side = NANO_IMAGE_SIZE
    tokenizer = build_vlm_tokenizer()
    return CoPRSProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=8, temporal_patch_size=1, merge_size=2, min_pixels=side**2, max_pixels=side**2
        ),
        tokenizer=tokenizer,
        sam_image_processor=Sam3ImageProcessor(size={"height": side, "width": side}),
        chat_template=tokenizer.chat_template,
        max_pixels=side**2,
        min_pixels=side**2,
        prompt_template=COPRS_NANO_TEMPLATE,
        canvas_size=side,
        coordinate_scale=COORDINATE_SCALE,
    )
