"""Meta's SAM 3 (package `sam3`) on the CPU with random weights: small by default, with the released code path.

The package requires a GPU. Three of its functions are patched while a model is built and run (see `on_cpu`).
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import itertools
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import Sam3Model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conceptseg_hf import sam_prompt
from conceptseg_hf.conversion.plan import make_plan
from conceptseg_hf.conversion.sam_weights import read_sam

IMAGE_SIZE = 112

# Arguments of Meta's classes for a small model; the remaining arguments are set by its builder.
_SMALL = {
    "ViT": {
        "img_size": IMAGE_SIZE,
        "pretrain_img_size": 56,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "global_att_blocks": (1, 2),
        "window_size": 4,
    },
    "VETextEncoder": {"width": 64, "heads": 4, "layers": 2},
    "TransformerEncoderFusion": {"num_layers": 2},
    "TransformerDecoder": {"num_layers": 2, "num_queries": 12, "resolution": IMAGE_SIZE},
    "SequenceGeometryEncoder": {"num_layers": 1},
}

# The equivalent configuration in Transformers.
SMALL_CONFIG: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 64,
            "intermediate_size": 296,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "pretrain_image_size": 56,
            "window_size": 4,
            "global_attn_indexes": [1, 2],
        },
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "text_config": {
        "model_type": "clip_text_model",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 512,
        "vocab_size": 49408,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
    },
    "geometry_encoder_config": {"num_layers": 1},
    "detr_encoder_config": {"num_layers": 2},
    "detr_decoder_config": {"num_layers": 2, "num_queries": 12},
}

_WORDS = ["circle", "square", "the", "odd", "one", "red", "a", "cat", "striped"]


def write_vocabulary(path: Path) -> Path:
    """Write a vocabulary of CLIP's size and format, whose first merges form a few words."""
    merges: dict[str, tuple[str, str]] = {}  # by merged token, which must be unique
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.setdefault("".join(pieces[:2]), tuple(pieces[:2]))
            pieces[:2] = ["".join(pieces[:2])]
    alphabet = list(bytes_to_unicode().values())
    for pair in itertools.product(alphabet, repeat=2):
        merges.setdefault("".join(pair), pair)
    count = 49152 - 256 - 2
    lines = ["#version", *map(" ".join, itertools.islice(merges.values(), count)), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@contextlib.contextmanager
def _triton() -> Iterator[None]:
    """Provide a stub of Triton while Meta's package is imported, and remove it for other packages."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = triton.autotune = lambda *args, **kwargs: args[0] if args else (lambda function: function)
    triton.Config = triton.heuristics = lambda *args, **kwargs: None
    language.constexpr = object
    triton.language = language
    sys.modules |= {"triton": triton, "triton.language": language}
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Patch Meta's package to run without a GPU, and without Triton, which the tested code does not use."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        with _triton():
            from sam3 import model_builder
        from sam3.model.decoder import TransformerDecoder

        coordinates, positions = TransformerDecoder._get_coords, model_builder.PositionEmbeddingSine

        def on_the_cpu(height: int, width: int, device: Any) -> Any:
            return coordinates(height, width, "cpu")

        for change in (
            mock.patch.object(TransformerDecoder, "_get_coords", staticmethod(on_the_cpu)),
            mock.patch.object(
                model_builder,
                "PositionEmbeddingSine",
                lambda **options: positions(**{**options, "precompute_resolution": None}),
            ),
            mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args: self),
        ):
            stack.enter_context(change)
        yield


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Build models on the meta device, except for the few values that the builder reads."""
    linspace = torch.linspace
    on_cpu = mock.patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with on_cpu, torch.device("meta"):
        yield


def build(vocabulary: Path, small: bool = True) -> torch.nn.Module:
    """Build Meta's image model with random weights in eval mode; must be called within `on_cpu`."""
    from sam3 import model_builder

    def with_arguments(kind: Any, changes: dict[str, Any]) -> Any:
        return lambda *args, **kwargs: kind(*args, **{**kwargs, **changes})

    with contextlib.ExitStack() as stack:
        for name, changes in (_SMALL if small else {}).items():
            changed = with_arguments(getattr(model_builder, name), changes)
            stack.enter_context(mock.patch.object(model_builder, name, changed))
        model = model_builder.build_sam3_image_model(
            bpe_path=str(vocabulary), device="cpu", checkpoint_path=None, load_from_HF=False
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if not p.is_meta):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # initial biases and norms are 0 and 1, which would hide swapped tensors
                parameter.add_(0.1 * noise)
            else:  # some of Meta's parameters are uninitialized
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


@torch.no_grad()
def run_theirs(
    meta: torch.nn.Module, pixels: torch.Tensor, prompts: list[str], concepts: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return Meta's outputs; concept tokens (B, L2, 256) are prepended to the text, as in the authors' fork."""
    from sam3.model.data_misc import FindStage

    features = meta.backbone.forward_image(pixels)
    features.update(meta.backbone.forward_text(prompts, device="cpu"))
    text = features["language_features"].transpose(0, 1)
    if concepts is not None:
        features["language_features"] = torch.cat([concepts, text], dim=1).transpose(0, 1)
        not_padded = features["language_mask"].new_zeros(concepts.shape[:2])  # the mask is True for padding
        features["language_mask"] = torch.cat([not_padded, features["language_mask"]], dim=1)
    rows = torch.arange(len(prompts))
    stage = FindStage(rows, rows, None, None, None, None, None)
    output = meta.forward_grounding(features, stage, None, meta._get_dummy_prompt(len(prompts)))
    return {
        "text": text,
        "semantic_seg": output["semantic_seg"],
        "presence": output["presence_logit_dec"].reshape(-1, 1),
        "boxes": output["pred_boxes_xyxy"],
        "masks": output["pred_masks"],
    }


@torch.no_grad()
def run_ours(
    sam: Sam3Model,
    pixels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    concepts: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the outputs of our model with the keys of `run_theirs`."""
    text, mask = sam_prompt.encode_text(sam, input_ids, attention_mask)
    output = sam_prompt.decode(sam, sam_prompt.encode_image(sam, pixels), text, mask, concepts)
    return {
        "text": text,
        "semantic_seg": output.semantic_seg,
        "presence": output.presence_logits,
        "boxes": output.pred_boxes,
        "masks": output.pred_masks,
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the maximum absolute difference, divided by the maximum absolute expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def load_ours(path: Path) -> Sam3Model:
    """Load a `sam3.pt` in `Sam3Model` with the converter."""
    weights = read_sam(path)
    model = Sam3Model(weights.config).eval()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    plan = make_plan([(weights.source, weights.rename)], expected, lambda name, dtype: torch.float32)
    assert plan.fits, plan.mismatches()
    model.load_state_dict({step.target: step.read() for step in plan.steps})
    return model


def save(meta: torch.nn.Module, path: Path) -> None:
    """Write a `sam3.pt` in the format that Meta publishes."""
    torch.save({"model": {f"detector.{name}": value for name, value in meta.state_dict().items()}}, path)
