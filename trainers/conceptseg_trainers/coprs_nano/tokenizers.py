"""The processors of small CoPRS checkpoints: the tokenizer of nano or mini with `<REF_POS>`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessor, Sam3ImageProcessor

from conceptseg_hf.coprs import CoPRSProcessor
from conceptseg_hf.presets import MINI_IMAGE_SIZE, MINI_PATCH_SIZE, NANO_IMAGE_SIZE
from conceptseg_hf.prompt_template import PromptTemplate

from ..from_scratch.tokenizers import COORDINATE_SCALE
from ..mini.tokenizers import mini_processor
from ..nano.tokenizers import build_vlm_tokenizer

COPRS_NANO_TEMPLATE = PromptTemplate(
    system="mark",
    with_proxy="boxes {reference_boxes} find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)


def build_processor() -> CoPRSProcessor:
    """Build the processor of coprs-nano: images of 128 pixels for the VLM and SAM, coordinates from 0 to 100."""
    return _build(build_vlm_tokenizer(), NANO_IMAGE_SIZE, patch_size=8)


def build_photos_processor() -> CoPRSProcessor:
    """Build the processor of a model that starts from mini: as that of nano, with images of 224 pixels."""
    return _build(mini_processor().tokenizer, MINI_IMAGE_SIZE, MINI_PATCH_SIZE)


def _build(tokenizer: PreTrainedTokenizerBase, side: int, patch_size: int) -> CoPRSProcessor:
    return CoPRSProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=patch_size,
            temporal_patch_size=1,
            merge_size=2,
            min_pixels=side**2,
            max_pixels=side**2,
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
