"""Loading of SAM 3 weights in any supported layout, and of the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Sam3Config

from ..configuration_conceptseg import ConceptSegConfig
from . import sam3
from .errors import ConversionError
from .plan import Rename
from .sources import (
    INDEX_NAME,
    SAFETENSORS_NAME,
    SafetensorsSource,
    TorchSource,
    WeightSource,
    find_folder,
    read_json,
)

TORCH_NAME = "sam3.pt"


@dataclass(frozen=True)
class SamWeights:
    """Weights and configuration of SAM 3.

    Attributes:
        path: Folder or file.
        source: The tensors.
        config: The configuration.
        rename: Maps tensor names to names in `Sam3Model`.
    """

    path: Path
    source: WeightSource
    config: Sam3Config
    rename: Rename


def read_sam(sam: str | os.PathLike) -> SamWeights:
    """Open the weights of SAM 3 and read the configuration.

    Raises:
        ConversionError: If weights or configuration are missing or invalid.
    """
    path = find_folder(sam, "SAM 3")
    folder = path if path.is_dir() else path.parent
    has_safetensors = any((folder / name).is_file() for name in (SAFETENSORS_NAME, INDEX_NAME))
    if path.is_file() or (not has_safetensors and (folder / TORCH_NAME).is_file()):
        file = path if path.is_file() else folder / TORCH_NAME
        if file.suffix == ".safetensors":
            raise ConversionError(f"SAM 3 {str(sam)!r} is a single safetensors file; give its folder.")
        # Meta's config.json does not describe the architecture. Without a Transformers config, use the released one.
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        return SamWeights(path, TorchSource(file), _sam_config(config, sam, default=True), sam3.from_meta)
    config = read_json(folder / "config.json")
    ours = config.get("model_type") == ConceptSegConfig.model_type
    if ours:
        config = config.get("sam_config") or {}
    rename = sam3.from_ours if ours else sam3.from_transformers
    return SamWeights(path, SafetensorsSource(folder), _sam_config(config, sam), rename)


def _sam_config(content: Mapping[str, Any], sam: str | os.PathLike, default: bool = False) -> Sam3Config:
    model_type = content.get("model_type")
    try:
        if model_type == "sam3_video":
            detector = AutoConfig.for_model(**content).detector_config
            return detector if isinstance(detector, Sam3Config) else Sam3Config(**detector)
        if model_type == "sam3":
            return Sam3Config.from_dict(dict(content))
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConversionError(
            f"the config.json of SAM 3 {str(sam)!r} does not describe a model ({' '.join(str(error).split())[:300]}); "
            "download it again."
        ) from error
    if default:
        return Sam3Config()
    raise ConversionError(
        f"SAM 3 {str(sam)!r} has model_type {model_type!r}; give facebook/sam3, its folder, sam3.pt, or a converted "
        "checkpoint."
    )
