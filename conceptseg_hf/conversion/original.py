"""The authors' layout beside the tensors: what their config.json says, and what ours adds to it on the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from ..configuration_conceptseg import (
    AUTHORS_MODEL_TYPES,
    SWITCHES,
    ConceptSegConfig,
    ConceptTranslationConfig,
)
from ..errors import one_line
from .errors import ConversionError
from .names import QUERIES
from .sources import TensorInfo

ARCHITECTURE = "ConceptSegR1ForConditionalGeneration_qwen2p5"
_MODEL_TYPE = AUTHORS_MODEL_TYPES[0]
RELEASED_HEADS = 16  # no tensor shows it

EXTRA_KEY = "conceptseg_hf"
"""Key of config.json under which `to_original` keeps what the authors' layout has no place for."""

# What is ours in a config, and of no use to the VLM's own.
_NOT_VLM = ("model_type", "architectures", "auto_map", "num_of_query", "transformers_version", EXTRA_KEY)
_OUR_FIELDS = ("sam_geometry_cls", "hidden_states_at", "router_base")
_RECORDED_CTM_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


def read_config(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], sam_config: PreTrainedConfig, name: str
) -> ConceptSegConfig:
    """Our configuration of an authors' checkpoint; sizes of the CTM are those of the tensors.

    Args:
        config: Content of its config.json.
        tensors: What its tensors are.
        sam_config: SAM 3's configuration.
        name: What the checkpoint is called, for messages.

    Raises:
        ConversionError: If it is no such checkpoint.
    """
    if config.get("model_type") not in AUTHORS_MODEL_TYPES:
        raise ConversionError(
            f"checkpoint {name!r} is of the type {config.get('model_type')!r}; give a ConceptSeg-R1 checkpoint "
            "in the authors' layout (Qwen2.5-VL with learnable_query, connector and proj_to_sam)."
        )
    if QUERIES not in tensors:
        raise ConversionError(
            f"checkpoint {name!r} holds no concept queries ({QUERIES}); give a ConceptSeg-R1 checkpoint, or join "
            "a plain VLM and SAM 3 with ConceptSegForSegmentation.from_backbones."
        )
    if any(re.search(r"visual\.blocks\.\d+\.mlp\.fc1\.", tensor) for tensor in tensors):
        raise ConversionError(
            f"checkpoint {name!r} has the vision tower of Qwen2-VL, which ConceptSeg does not know; give one "
            "made from Qwen2.5-VL."
        )
    extra = config.get(EXTRA_KEY) or {}
    try:
        return ConceptSegConfig(
            vlm_config=_vlm_config(config, tensors),
            sam_config=sam_config,
            ctm_config=_ctm_config(tensors, extra.get("ctm") or {}, sam_config),
            **{key: extra[key] for key in (*_OUR_FIELDS, *SWITCHES) if key in extra},
        )
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = one_line(error)
        raise ConversionError(
            f"the config.json of checkpoint {name!r} does not describe a model ({reason[:300]}); download it again."
        ) from error


def write_config(
    config: ConceptSegConfig, dtype: str | None, processor: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of our model in the authors' layout.

    Args:
        config: Our configuration.
        dtype: Number format of the VLM, such as "bfloat16".
        processor: Settings of our processor to keep.
    """
    content = _own_fields(config.vlm_config)
    # Releases of Transformers before 4.52 read the language model's fields from the top.
    text = _own_fields(content.pop("text_config"))
    rope = text.pop("rope_parameters", None) or {}
    vision = _own_fields(content.pop("vision_config"))
    vision.pop("rope_parameters", None)
    return {
        **text,
        **content,
        "model_type": _MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "num_of_query": config.ctm_config.num_queries,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": rope.get("rope_theta", 1000000.0),
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope.get("mrope_section", ()))},
        "torch_dtype": dtype,
        "vision_config": {**vision, "model_type": _MODEL_TYPE, "in_chans": vision.get("in_channels", 3)},
        EXTRA_KEY: {
            "ctm": {key: getattr(config.ctm_config, key) for key in _RECORDED_CTM_FIELDS},
            **{key: getattr(config, key) for key in _OUR_FIELDS},
            **config.switches,
            **({"processor": dict(processor)} if processor else {}),
        },
    }


def _own_fields(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says beyond what any model has (labels, paths, ...)."""
    content = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    common = {*PreTrainedConfig().to_dict(), "_name_or_path", "layer_types"}
    return {key: value for key, value in content.items() if key not in common}


def _vlm_config(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Qwen2_5_VLConfig:
    fields = {key: value for key, value in config.items() if key not in _NOT_VLM}
    vision = {key: value for key, value in (fields.get("vision_config") or {}).items() if key != "model_type"}
    if config["model_type"] != _MODEL_TYPE:  # its vision fields mean other things: the tensors say the sizes
        vision.update(_vision_sizes(tensors))
    return Qwen2_5_VLConfig(**{**fields, "vision_config": vision})


def _vision_sizes(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    shapes = {name.removeprefix("model."): info.shape for name, info in tensors.items()}
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"visual\.blocks\.(\d+)\.", name))}
    return {
        "depth": len(blocks),
        "hidden_size": shapes["visual.patch_embed.proj.weight"][0],
        "intermediate_size": shapes["visual.blocks.0.mlp.gate_proj.weight"][0],
        "out_hidden_size": shapes["visual.merger.mlp.2.weight"][0],
    }


def _ctm_config(
    tensors: Mapping[str, TensorInfo], recorded: Mapping[str, Any], sam_config: PreTrainedConfig
) -> ConceptTranslationConfig:
    num_queries, width = tensors[QUERIES].shape
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"connector\.blocks\.(\d+)\.", name))}
    wide = tensors.get("connector.blocks.0.mlp.fc1.weight")
    return ConceptTranslationConfig(
        hidden_size=width,
        num_queries=num_queries,
        num_layers=max(blocks, default=-1) + 1,
        mlp_ratio=4 if wide is None else wide.shape[0] // width,
        sam_hidden_size=sam_config.detr_encoder_config.hidden_size,
        **{
            "num_attention_heads": RELEASED_HEADS,
            **{key: recorded[key] for key in _RECORDED_CTM_FIELDS if key in recorded},
        },
    )
