"""Small random CoPRS models with both kinds of SAM, and their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conceptseg_hf import CoPRSConfig, CoPRSForSegmentation, CoPRSProcessor, nano_checkpoint

SAM_SIZE = 128


def sam_config(kind: str) -> dict[str, Any]:
    """Return the config of a small SAM with features of 16 x 16 and masks of 64 x 64."""
    if kind == "sam3_tracker":
        return CoPRSConfig.from_preset("nano").sam_config.to_dict()
    width = 32
    return {
        "model_type": "sam",
        "vision_config": {
            "hidden_size": 32,
            "output_channels": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SAM_SIZE,
            "patch_size": 8,
            "global_attn_indexes": [1],
            "window_size": 8,
            "num_pos_feats": width // 2,
            "mlp_dim": 64,
            "initializer_range": 0.02,
        },
        "prompt_encoder_config": {"hidden_size": width, "image_size": SAM_SIZE, "patch_size": 8},
        "mask_decoder_config": {
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    }


def build_processor(
    kind: str,
    image_processor: Any = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    vlm_family: str = "qwen2_5_vl",
) -> CoPRSProcessor:
    # These require torchvision or the shim of conceptseg_hf, which must be imported first.
    from transformers import Qwen2VLImageProcessor, Sam3ImageProcessor, SamImageProcessor

    square = {"height": SAM_SIZE, "width": SAM_SIZE}
    sam_image_processor = (
        SamImageProcessor(size={"longest_edge": SAM_SIZE}, pad_size=square)
        if kind == "sam"
        else Sam3ImageProcessor(size=square)
    )
    return CoPRSProcessor(
        image_processor or Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=1),
        tokenizer or AutoTokenizer.from_pretrained(nano_checkpoint()),
        sam_image_processor,
        max_pixels=64 * 64,
        min_pixels=16 * 16,
        canvas_size=64,
        coordinate_scale=100,
        vlm_family=vlm_family,
    )


def build_random_coprs(
    kind: str = "sam", seed: int = 0, processor: CoPRSProcessor | None = None, **overrides: Any
) -> CoPRSForSegmentation:
    """Create a random model, in eval mode, with large weights, so that images and prompts differ."""
    processor = processor or build_processor(kind)
    torch.manual_seed(seed)
    config = CoPRSConfig.from_preset(
        "nano", sam_config=sam_config(kind), ref_pos_token_id=processor.ref_pos_token_id, **overrides
    )
    model = CoPRSForSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.processor = processor
    return model


def save_random_coprs(folder: Path, kind: str = "sam", **overrides: Any) -> CoPRSForSegmentation:
    """Save a random model whose completions end with `<REF_POS>` at once, with its processor, and return it."""
    model = build_random_coprs(kind, **overrides)
    model.config.max_new_tokens = 2
    model.generation_config.sequence_bias = [[[model.config.ref_pos_token_id], 1e6]]
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return model
