"""The embedded model, also with as many SAM 3 patches as the released SAM 3; used by several benchmarks."""

from __future__ import annotations

import torch

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint

PATCHES = (16, 72)
"""Patches per side of the embedded SAM 3 and of the released one."""


def load(patches: int = PATCHES[0]) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Return the embedded model with the given number of SAM 3 patches per side, and its processor.

    With another number than the trained one, SAM 3 has the same width and depth but random weights.
    """
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    config = model.config
    vision = config.sam_config.vision_config
    side = patches * vision.backbone_config.patch_size
    if side != vision.backbone_config.image_size:
        vision.backbone_config.image_size = side
        vision.backbone_feature_sizes = [[patches * scale // 2] * 2 for scale in (4, 2, 1)]
        torch.manual_seed(0)
        larger = ConceptSegForSegmentation(config)
        larger.vlm, larger.ctm = model.vlm, model.ctm
        model = larger.eval()
        processor.sam_image_processor.size = {"height": side, "width": side}
    return model, processor
