"""Joins the stages into one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor

from .tokenizers import build_processor


def load_stage(
    run_dir: Path, vlm_stage: str = "vlm"
) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """The model with the averaged weights of the stages "sam" and "vlm" and a new CTM, and its processor.

    Args:
        run_dir: Folder of the stages.
        vlm_stage: Name of the stage that trained the VLM: "vlm" or "base".

    Raises:
        FileNotFoundError: If one of the two stages has not been run.
    """
    torch.manual_seed(0)
    # SAM 3 is trained so that concept tokens, which carry a box, are not followed by its token for "no box".
    config = ConceptSegConfig.from_preset("nano", sam_geometry_cls_with_concepts=False)
    model = ConceptSegForSegmentation(config)
    for part, stage, prefix in ((model.sam, "sam", "sam."), (model.vlm, vlm_stage, "vlm.")):
        path = run_dir / stage / "state.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; run the stage {stage!r} first.")
        _load(
            part,
            {
                name.removeprefix(f"average/{prefix}"): t
                for name, t in load_file(path).items()
                if name.startswith(f"average/{prefix}")
            },
        )
    processor = build_processor()
    tokenizer = processor.tokenizer
    settings = model.vlm.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        96,
    )
    return model, processor


def _load(part: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = part.load_state_dict(weights, strict=False)
    tied = {name for name in missing if name == "lm_head.weight"}
    if unexpected or set(missing) - tied - {name for name, _ in part.named_buffers()}:
        raise ValueError(
            f"stage weights do not fit: missing {sorted(set(missing) - tied)}, unexpected {unexpected}."
        )


def write_checkpoint(model: ConceptSegForSegmentation, processor: ConceptSegProcessor, folder: Path) -> None:
    """Writes the model and its processor as one checkpoint folder."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
