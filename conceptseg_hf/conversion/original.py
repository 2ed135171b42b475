"""The config.json of the authors' layout: reading it, and writing it with additional settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from ..configuration_conceptseg import (
    AUTHORS_MODEL_TYPES,
    OPTIONAL_FIELDS,
    ConceptSegConfig,
    ConceptTranslationConfig,
)
from ..errors import one_line
from .errors import ConversionError
from .names import QUERIES
from .sources import TensorInfo

ARCHITECTURE = "ConceptSegR1ForConditionalGeneration_qwen2p5"
_MODEL_TYPE = AUTHORS_MODEL_TYPES[0]
RELEASED_HEADS = 16  # cannot be inferred from tensor shapes

EXTRA_KEY = "conceptseg_hf"
"""Key of config.json under which `to_original` stores settings that the authors' layout does not support."""

# Keys of config.json that do not belong to the VLM's config.
_NOT_VLM = ("model_type", "architectures", "auto_map", "num_of_query", "transformers_version", EXTRA_KEY)
_OUR_FIELDS = ("sam_geometry_cls", "hidden_states_at", "router_base")
_RECORDED_CTM_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


def read_config(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], sam_config: PreTrainedConfig, name: str
) -> ConceptSegConfig:
    """Build our configuration for an authors' checkpoint; the sizes of the CTM are inferred from its tensors.

    Args:
        config: Content of config.json.
        tensors: Shapes and dtypes of the tensors by name.
        sam_config: Configuration of SAM 3.
        name: Name of the checkpoint in error messages.

    Raises:
        ConversionError: If it is not a ConceptSeg-R1 checkpoint in the authors' layout.
    """
    if config.get("model_type") not in AUTHORS_MODEL_TYPES:
        raise ConversionError(
            f"checkpoint {name!r} has model_type {config.get('model_type')!r}; give a ConceptSeg-R1 checkpoint "
            "in the authors' layout (Qwen2.5-VL with learnable_query, connector and proj_to_sam)."
        )
    if QUERIES not in tensors:
        raise ConversionError(
            f"checkpoint {name!r} contains no concept queries ({QUERIES}); give a ConceptSeg-R1 checkpoint, or combine "
            "a plain VLM and SAM 3 with ConceptSegForSegmentation.from_backbones."
        )
    if any(re.search(r"visual\.blocks\.\d+\.mlp\.fc1\.", tensor) for tensor in tensors):
        raise ConversionError(
            f"checkpoint {name!r} has the vision tower of Qwen2-VL, which ConceptSeg does not support; give a "
            "checkpoint based on Qwen2.5-VL."
        )
    extra = config.get(EXTRA_KEY) or {}
    try:
        return ConceptSegConfig(
            vlm_config=_vlm_config(config, tensors),
            sam_config=sam_config,
            ctm_config=_ctm_config(tensors, extra.get("ctm") or {}, sam_config),
            **{key: extra[key] for key in (*_OUR_FIELDS, *OPTIONAL_FIELDS) if key in extra},
        )
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reason = one_line(error)
        raise ConversionError(
            f"the config.json of checkpoint {name!r} does not describe a model ({reason[:300]}); download it again."
        ) from error


def write_config(
    config: ConceptSegConfig, dtype: str | None, processor: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of config.json in the authors' layout for our model.

    Args:
        config: Our configuration.
        dtype: Dtype of the VLM, such as "bfloat16".
        processor: Settings of our processor to store.
    """
    content = _specific_fields(config.vlm_config)
    # Transformers before 4.52 reads the fields of the language model from the top level.
    text = _specific_fields(content.pop("text_config"))
    rope = text.pop("rope_parameters", None) or {}
    vision = _specific_fields(content.pop("vision_config"))
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
            **config.non_default_fields,
            **({"processor": dict(processor)} if processor else {}),
        },
    }


def _specific_fields(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration without those common to all models (labels, paths, ...)."""
    content = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    common = {*PreTrainedConfig().to_dict(), "_name_or_path", "layer_types"}
    return {key: value for key, value in content.items() if key not in common}


def _vlm_config(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Qwen2_5_VLConfig:
    fields = {key: value for key, value in config.items() if key not in _NOT_VLM}
    vision = {key: value for key, value in (fields.get("vision_config") or {}).items() if key != "model_type"}
    if (
        config["model_type"] != _MODEL_TYPE
    ):  # Qwen2-VL vision fields have other meanings: infer the sizes from the tensors
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
    fc1 = tensors.get("connector.blocks.0.mlp.fc1.weight")
    return ConceptTranslationConfig(
        hidden_size=width,
        num_queries=num_queries,
        num_layers=max(blocks, default=-1) + 1,
        mlp_ratio=4 if fc1 is None else fc1.shape[0] // width,
        sam_hidden_size=sam_config.detr_encoder_config.hidden_size,
        **{
            "num_attention_heads": RELEASED_HEADS,
            **{key: recorded[key] for key in _RECORDED_CTM_FIELDS if key in recorded},
        },
    )
