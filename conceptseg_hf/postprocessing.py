"""Post-processing of model outputs to masks and boxes in pixels of the input images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .coordinates import CoordinateFrame
from .finite import is_finite
from .inputs import known
from .outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs

_NOT_FINITE = (
    "the model's output for this sample is not finite (NaN); load the checkpoint in float32 or bfloat16, or use a "
    "checkpoint from a training run that did not diverge."
)


def post_process_mask(
    logits: torch.Tensor, size: tuple[int, int], resampling: str = "bilinear", threshold: float = 0.5
) -> tuple[Image.Image, np.ndarray]:
    """Resize mask logits to the size of an image and threshold them.

    Args:
        logits: Semantic mask logits, (h, w).
        size: (width, height) of the image.
        resampling: Interpolation mode, `"bilinear"` or `"bicubic"`.
        threshold: Probability threshold of the mask.

    Returns:
        The mask, an "L" image of 0 and 255, and the probabilities, float32 (H, W).
    """
    width, height = size
    logits = torch.nn.functional.interpolate(
        logits.detach().float()[None, None], size=(height, width), mode=resampling, align_corners=False
    )[0, 0]
    mask = (logits > math.log(threshold / (1 - threshold))).to(torch.uint8).mul_(255).cpu().numpy()
    return Image.fromarray(mask), logits.sigmoid().cpu().numpy()


def post_process_all(
    outputs: SegmentationOutputs | Sequence[RawSegmentation],
    resampling: str,
    threshold: float,
    return_heatmap: bool,
    return_logits: bool,
) -> list[ConceptSegmentation]:
    """Convert model outputs to results; see `ConceptSegProcessor.post_process_concept_segmentation`.

    Raises:
        ValueError: If the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(
            f"post_process_concept_segmentation: threshold is {threshold}; use a probability between 0 and 1."
        )
    raw = outputs.raw if isinstance(outputs, SegmentationOutputs) else outputs
    return [post_process(each, resampling, threshold, return_heatmap, return_logits) for each in raw]


def post_process(
    raw: RawSegmentation,
    resampling: str = "bilinear",
    threshold: float = 0.5,
    return_heatmap: bool = False,
    return_logits: bool = False,
) -> ConceptSegmentation:
    """Convert one model output to a result; see `ConceptSegProcessor.post_process_concept_segmentation`."""
    if raw.error is not None:
        return ConceptSegmentation.failed(raw.error, raw.prompt)
    frame = known(raw.frame, "coordinate frame")
    logits, prior = known(raw.mask_logits, "mask logits"), raw.prior_logits
    presence = known(raw.decode_presence, "presence") if prior is None else 1.0
    if not (math.isfinite(presence) and is_finite(logits) and (prior is None or is_finite(prior))):
        return ConceptSegmentation.failed(_NOT_FINITE, raw.prompt)
    mask, probability = post_process_mask(logits, frame.image_size, resampling, threshold)
    foreground = probability[probability > threshold]
    result = ConceptSegmentation(
        mask=mask,
        label=raw.prompt,
        score=presence * float(foreground.mean()) if foreground.size else 0.0,
        route=raw.route,
        route_reason=raw.reason,
        presence=raw.presence,
        threshold=raw.threshold,
        decode_presence=raw.decode_presence,
        heatmap=probability if return_heatmap else None,
        mask_logits=logits.cpu().numpy() if return_logits else None,
    )
    if prior is not None and return_heatmap:
        _, result.heatmap = post_process_mask(prior, frame.image_size)
    if raw.completion is not None:
        _add_completion(result, raw, frame)
    return result


def _add_completion(result: ConceptSegmentation, raw: RawSegmentation, frame: CoordinateFrame) -> None:
    completion = known(raw.completion, "completion")
    result.label = completion.answer or raw.prompt
    result.think, result.rule, result.answer = completion.think, completion.rule, completion.answer
    result.completion = completion.text
    if completion.bbox is not None:
        result.box = frame.text_box_to_image(completion.bbox)
    if completion.check is not None:
        result.check_reference, result.check = frame.text_box_to_reference(completion.check)
    if raw.prior_logits is None:  # completions of CoPRS have no check
        result.check_iou = frame.check_iou(completion.check)
