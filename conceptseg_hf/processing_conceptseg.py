"""ConceptSegProcessor: converts images, prompts and references to tensors, and model outputs to masks and boxes.

Coordinate transforms are implemented by `coordinates.CoordinateFrame`; each sample has one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from .completion import Completion, parse_completion
from .configuration_conceptseg import conversion_hint, is_original_config
from .coordinates import CoordinateFrame
from .inputs import ConceptSegInputs, PreparedSample
from .mosaic import RESAMPLING, MosaicSettings
from .outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs
from .postprocessing import post_process_all, post_process_mask
from .processor_settings import checked_settings
from .prompt_processing import PromptProcessor
from .prompt_template import PromptTemplate
from .vlm_families import DEFAULT_FAMILY

# Arguments of the model's `forward` for SAM 3; `VlmFamily.input_names` are those for the VLM.
_SAM_INPUT_NAMES = ("sam_pixel_values", "sam_input_ids", "sam_attention_mask")


class ConceptSegProcessor(PromptProcessor):
    """Processor that combines the tokenizers and image processors of the VLM and SAM 3 with a prompt template.

    Args:
        image_processor: The VLM's image processor.
        tokenizer: The VLM's tokenizer; its padding side is set to left, as required for batched generation.
        sam_image_processor: SAM 3's image processor.
        sam_tokenizer: SAM 3's tokenizer; its padding side is set to right.
        chat_template: Jinja chat template. Defaults to the tokenizer's template, or to the family's if the tokenizer
            has none.
        canvas_size: Side of the square canvas to which the mosaic and the target are resized before the VLM's image
            processor, by default that of the family (600 for Qwen2.5-VL, as in the paper). The image processor then
            only rounds it to a multiple of its patch and merge size (600 -> 588 for Qwen2.5-VL).
        coordinate_scale: Length of a canvas side in text coordinates: 1 for decimals, `canvas_size` for integer canvas
            pixels. By default that of the family (1 for Qwen2.5-VL, as in the paper).
        sam_text_length: Number of tokens of SAM 3's text input; longer texts are truncated.
        prompt_template: Instruction template, as `PromptTemplate` or `PromptTemplate.to_dict()`; defaults to the
            official one. Saved in processor_config.json.
        mosaic: Layout of the references and handling of their boxes: `MosaicSettings`, or a mapping of its fields.
        shortcut_size: Side of the square to which the target is resized (bicubic) before SAM 3's image processor on
            the shortcut; None to use the original target on both routes.
        sam_resampling: Pillow filter for resizing the target to SAM 3's input size: `"bicubic"` or `"bilinear"`; None
            to leave resizing to SAM 3's image processor.
        mask_resampling: Interpolation of SAM 3's mask logits to the target's size: `"bilinear"` or `"bicubic"`.
        vlm_family: Family of the VLM, the `model_type` of its configuration; see `vlm_families`.

    The last five settings are saved only if they differ from their defaults.
    """

    return_mm_token_type_ids = True

    image_processor: Any
    tokenizer: Any
    sam_image_processor: Any
    sam_tokenizer: Any
    canvas_size: int
    coordinate_scale: float
    sam_text_length: int
    prompt_template: dict[str, Any]
    mosaic: dict[str, Any] | None
    shortcut_size: int | None
    sam_resampling: str | None
    mask_resampling: str
    vlm_family: str

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_processor: Any = None,
        sam_tokenizer: Any = None,
        chat_template: str | None = None,
        canvas_size: int | None = None,
        coordinate_scale: float | None = None,
        sam_text_length: int = 32,
        prompt_template: Mapping[str, str] | PromptTemplate | None = None,
        mosaic: Mapping[str, Any] | MosaicSettings | None = None,
        shortcut_size: int | None = None,
        sam_resampling: str | None = None,
        mask_resampling: str = "bilinear",
        vlm_family: str = DEFAULT_FAMILY,
    ) -> None:
        settings = {
            **self._family_settings(vlm_family, canvas_size, coordinate_scale),
            "sam_text_length": sam_text_length,
            "prompt_template": prompt_template,
            "mosaic": mosaic,
            "shortcut_size": shortcut_size,
            "sam_resampling": sam_resampling,
            "mask_resampling": mask_resampling,
        }
        settings = checked_settings(settings)
        super().__init__(
            image_processor, tokenizer, sam_image_processor, sam_tokenizer, chat_template=chat_template
        )
        # Tokenizers do not save their padding side, and `from_pretrained(padding_side=...)` would set it for both.
        tokenizer.padding_side = "left"
        sam_tokenizer.padding_side = "right"
        for name, value in settings.items():
            setattr(self, name, value)
        self._read_tokens()

    @classmethod
    def from_backbones(
        cls, vlm: str | os.PathLike, sam: str | os.PathLike, **settings: Any
    ) -> ConceptSegProcessor:
        """Combine the tokenizers and image processors of a VLM and SAM 3, for training in stage I.

        Args:
            vlm: Model id or folder of the VLM, whose configuration determines `vlm_family`.
            sam: Model id or folder of SAM 3.
            **settings: Arguments of the class from `chat_template` on.
        """
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(vlm),
            tokenizer=AutoTokenizer.from_pretrained(vlm),
            sam_image_processor=AutoImageProcessor.from_pretrained(sam),
            sam_tokenizer=AutoTokenizer.from_pretrained(sam),
            **{"vlm_family": AutoConfig.from_pretrained(vlm).model_type, **settings},
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> ConceptSegProcessor:
        """Load a processor; raise an error with the conversion command for a checkpoint in the authors' layout."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ValueError, OSError):
            config = Path(pretrained_model_name_or_path, "config.json")
            if config.is_file() and is_original_config(json.loads(config.read_text(encoding="utf-8"))):
                raise ValueError(conversion_hint(pretrained_model_name_or_path)) from None
            raise

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's `forward` arguments that the processor creates."""
        return [*self.family.input_names, *_SAM_INPUT_NAMES]

    def sam_pixels(self, image: Image.Image) -> torch.Tensor:
        """Return SAM 3's input for an RGB image, (3, S, S)."""
        if self.sam_resampling is not None:
            size = self.sam_image_processor.size
            image = image.resize((size["width"], size["height"]), RESAMPLING[self.sam_resampling])
        return self.sam_image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def sam_text(
        self, texts: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return SAM 3's text input: (input_ids, attention_mask), padded or truncated to (B, sam_text_length)."""
        encoded = self.sam_tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.sam_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    # Post-processing

    def decode_completion(
        self, token_ids: torch.Tensor | Sequence[int], sample: PreparedSample | None = None
    ) -> Completion:
        """Decode and parse one completion.

        Args:
            token_ids: Completion tokens, (T,).
            sample: The sample of the completion, which determines whether `<check>` is expected.
        """
        text = self.decode_text(token_ids)
        expect_check = None if sample is None or sample.frame is None else sample.frame.proxy is not None
        return parse_completion(text, self.coordinate_scale, expect_check)

    def post_process_mask(
        self, logits: torch.Tensor, frame: CoordinateFrame
    ) -> tuple[Image.Image, np.ndarray]:
        """Resize SAM 3's mask logits to the target image and threshold them.

        Args:
            logits: Semantic mask logits, (h, w).
            frame: The sample's coordinate frame.

        Returns:
            The mask, an "L" image of 0 and 255 (logits > 0 after resizing, see `mask_resampling`), and the
            probabilities, float32 (H, W).
        """
        return post_process_mask(logits, frame.image_size, self.mask_resampling)

    def post_process_concept_segmentation(
        self,
        outputs: SegmentationOutputs | Sequence[RawSegmentation],
        threshold: float = 0.5,
        return_heatmap: bool = False,
        return_logits: bool = False,
    ) -> list[ConceptSegmentation]:
        """Convert the model's outputs to results in pixels of the input images.

        Args:
            outputs: Output of `model.segment(**inputs)` without a processor.
            threshold: Probability threshold of the mask, between 0 and 1 (exclusive).
            return_heatmap: Also return the mask probabilities.
            return_logits: Also return SAM 3's mask logits at their original resolution.

        Returns:
            One result per output, in the order of the outputs.

        Raises:
            ValueError: If the threshold is not between 0 and 1.
        """
        return post_process_all(outputs, self.mask_resampling, threshold, return_heatmap, return_logits)


Frame = CoordinateFrame  # former name, kept for compatibility

__all__ = ["ConceptSegInputs", "ConceptSegProcessor", "CoordinateFrame", "Frame", "PreparedSample"]
