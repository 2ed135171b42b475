"""CoPRSProcessor: prompts and images for the VLM and SAM, and outputs to masks and heatmaps."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from ..completion import Completion
from ..coordinates import CoordinateFrame
from ..mosaic import MosaicSettings
from ..outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs
from ..postprocessing import post_process_all, post_process_mask
from ..processor_settings import checked_settings
from ..prompt_processing import PromptProcessor
from ..prompt_template import PromptTemplate
from ..vlm_families import DEFAULT_FAMILY
from .completion import REF_POS, parse_reasoning
from .template import COPRS_TEMPLATE

MAX_PIXELS, MIN_PIXELS = 705_600, 3_136  # appendix B.3: 900 image tokens at most
_SETTINGS = ("canvas_size", "coordinate_scale", "prompt_template", "mosaic")


class CoPRSProcessor(PromptProcessor):
    """Processor that combines the VLM's processor, SAM's image processor and a prompt template.

    The VLM sees the target with its aspect ratio. References, if there are any, are arranged on a mosaic before it, as
    for ConceptSeg.

    Args:
        image_processor: The VLM's image processor.
        tokenizer: The VLM's tokenizer, to which `<REF_POS>` is added; its padding side is set to left.
        sam_image_processor: SAM's image processor: `SamImageProcessor`, which pads images to a square, or that of SAM
            3, which resizes them to one.
        chat_template: Jinja chat template; defaults to the tokenizer's, or to the family's.
        max_pixels: Maximum number of pixels of an image for the VLM; larger images are downsampled.
        min_pixels: Minimum number of pixels of an image for the VLM.
        prompt_template: Instruction template, as `PromptTemplate` or `PromptTemplate.to_dict()`.
        canvas_size: Side of the mosaic of references; by default that of the VLM's family.
        coordinate_scale: Length of a side of the mosaic in text coordinates; by default that of the VLM's family.
        mosaic: Layout of the references; see `ConceptSegProcessor`.
        vlm_family: Family of the VLM, the `model_type` of its configuration; see `vlm_families`. Families with images
            of one size do not keep the aspect ratio, and ignore `max_pixels` and `min_pixels`.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_processor: Any = None,
        chat_template: str | None = None,
        max_pixels: int = MAX_PIXELS,
        min_pixels: int = MIN_PIXELS,
        prompt_template: Mapping[str, str] | PromptTemplate | None = None,
        canvas_size: int | None = None,
        coordinate_scale: float | None = None,
        mosaic: Mapping[str, Any] | MosaicSettings | None = None,
        vlm_family: str = DEFAULT_FAMILY,
    ) -> None:
        settings = checked_settings(
            {
                **self._family_settings(vlm_family, canvas_size, coordinate_scale),
                "prompt_template": COPRS_TEMPLATE if prompt_template is None else prompt_template,
                "mosaic": mosaic,
            }
        )
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"CoPRSProcessor: min_pixels is {min_pixels} and max_pixels {max_pixels}; use positive numbers and "
                "a larger max_pixels."
            )
        super().__init__(image_processor, tokenizer, sam_image_processor, chat_template=chat_template)
        tokenizer.padding_side = "left"
        if REF_POS not in tokenizer.get_vocab():
            # Not a special token: decoding without special tokens keeps it.
            tokenizer.add_tokens([AddedToken(REF_POS, special=False, normalized=False)])
        self.ref_pos_token_id = tokenizer.get_vocab()[REF_POS]
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
        for name, value in settings.items():
            setattr(self, name, value)
        self._read_tokens()

    @classmethod
    def from_backbones(
        cls, vlm: str | os.PathLike, sam: str | os.PathLike, **settings: Any
    ) -> CoPRSProcessor:
        """Combine the processors of a VLM and of SAM, given by their ids or folders.

        Args:
            vlm: The VLM, whose configuration determines `vlm_family`.
            sam: The `SamModel` or `Sam3TrackerModel`.
            **settings: Arguments of the class from `chat_template` on.
        """
        processor = AutoProcessor.from_pretrained(vlm)
        template = settings.pop("chat_template", None) or getattr(processor, "chat_template", None)
        return cls(
            copy.deepcopy(processor.image_processor),
            copy.deepcopy(processor.tokenizer),
            AutoImageProcessor.from_pretrained(sam),
            chat_template=template,
            **{"vlm_family": AutoConfig.from_pretrained(vlm).model_type, **settings},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's attributes as a dictionary, without those that follow from others."""
        values = super().to_dict()
        values.pop("ref_pos_token_id", None)
        return values

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's `forward` arguments that the processor creates."""
        return [*self.family.input_names, "sam_pixel_values"]

    # Preprocessing

    def check_prompt(self, prompt: str) -> None:
        """Raise a ValueError if a prompt is invalid; the message is one sentence."""
        super().check_prompt(prompt)
        if REF_POS in prompt:
            raise ValueError(f"prompt contains the reserved token {REF_POS!r}; remove it.")

    @property
    def _pixel_limits(self) -> tuple[int, int]:
        return self.min_pixels, self.max_pixels

    def _on_canvas(self, image: Image.Image) -> Image.Image:
        return image

    def sam_pixels(self, image: Image.Image) -> Tensor:
        """Return SAM's input for an RGB image, (3, S, S)."""
        return self.sam_image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    @property
    def sam_image_size(self) -> int:
        """Side length of SAM's input."""
        size = self.sam_image_processor.pad_size if self._pads else self.sam_image_processor.size
        return int(size["height"])

    @property
    def _pads(self) -> bool:
        return bool(self.sam_image_processor.do_pad) and self.sam_image_processor.pad_size is not None

    def valid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that an image of size (width, height) has within SAM's input."""
        side = self.sam_image_size
        if not self._pads:
            return side, side
        width, height = image_size
        scale = self.sam_image_processor.size["longest_edge"] / max(image_size)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def mask_to_sam(self, mask: np.ndarray) -> Tensor:
        """Transform an (H, W) bool mask as SAM's input: (S, S) bool, false at padding."""
        height, width = self.valid_size((mask.shape[1], mask.shape[0]))
        resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
        result = torch.zeros(self.sam_image_size, self.sam_image_size, dtype=torch.bool)
        result[:height, :width] = torch.from_numpy(np.array(resized, dtype=bool))
        return result

    # Post-processing

    def decode_completion(self, token_ids: Tensor | Sequence[int], sample: Any = None) -> Completion:
        """Decode and parse one completion, which includes `<REF_POS>`.

        Args:
            token_ids: Completion tokens, (T,).
            sample: Ignored; for compatibility with ConceptSeg.
        """
        return parse_reasoning(self.decode_text(token_ids))

    def post_process_mask(self, logits: Tensor, frame: CoordinateFrame) -> tuple[Image.Image, np.ndarray]:
        """Resize (h, w) logits without padding to the target image; see `postprocessing.post_process_mask`."""
        return post_process_mask(logits, frame.image_size)

    def post_process_concept_segmentation(
        self,
        outputs: SegmentationOutputs | Sequence[RawSegmentation],
        threshold: float = 0.5,
        return_heatmap: bool = True,
        return_logits: bool = False,
    ) -> list[ConceptSegmentation]:
        """Convert the model's outputs to results in pixels of the input images.

        Args:
            outputs: Output of `model.segment(**inputs)` without a processor.
            threshold: Probability threshold of the mask, between 0 and 1 (exclusive).
            return_heatmap: Whether results contain the positional prior as probabilities.
            return_logits: Also return the mask logits, without padding.

        Raises:
            ValueError: If the threshold is not between 0 and 1.
        """
        return post_process_all(outputs, "bilinear", threshold, return_heatmap, return_logits)
