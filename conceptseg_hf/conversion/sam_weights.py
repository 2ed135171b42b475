"""Finding SAM 3: its weights, in whichever layout, and its configuration."""

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
    """SAM 3 as it was found.

    Attributes:
        path: Folder or file.
        source: Its tensors.
        config: Its configuration.
        rename: What its tensors are called in `Sam3Model`.
    """

    path: Path
    source: WeightSource
    config: Sam3Config
    rename: Rename


def read_sam(sam: str | os.PathLike) -> SamWeights:
    """Finds SAM 3's weights and configuration.

    Raises:
        ConversionError: If there are none.
    """
    path = find_folder(sam, "SAM 3")
    folder = path if path.is_dir() else path.parent
    has_safetensors = any((folder / name).is_file() for name in (SAFETENSORS_NAME, INDEX_NAME))
    if path.is_file() or (not has_safetensors and (folder / TORCH_NAME).is_file()):
        file = path if path.is_file() else folder / TORCH_NAME
        if file.suffix == ".safetensors":
            raise ConversionError(
                f"SAM 3 {str(sam)!r} is a single safetensors file; give the folder that it is in."
            )
        # Meta's config.json says nothing of the architecture: without Transformers' own it is the released one.
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        return SamWeights(path, TorchSource(file), _sam_config(config, sam, default=True), sam3.from_meta)
    config = read_json(folder / "config.json")
    ours = config.get("model_type") == ConceptSegConfig.model_type
    if ours:
        config = config.get("sam_config") or {}
    rename = sam3.from_ours if ours else sam3.from_transformers
    return SamWeights(path, SafetensorsSource(folder), _sam_config(config, sam), rename)


def _sam_config(content: Mapping[str, Any], sam: str | os.PathLike, default: bool = False) -> Sam3Config:
    kind = content.get("model_type")
    try:
        if kind == "sam3_video":
            detector = AutoConfig.for_model(**content).detector_config
            return detector if isinstance(detector, Sam3Config) else Sam3Config(**detector)
        if kind == "sam3":
            return Sam3Config.from_dict(dict(content))
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConversionError(
            f"the config.json of SAM 3 {str(sam)!r} does not describe a model ({' '.join(str(error).split())[:300]}); "
            "download it again."
        ) from error
    if default:
        return Sam3Config()
    raise ConversionError(
        f"SAM 3 {str(sam)!r} is of the type {kind!r}; give facebook/sam3, its folder, sam3.pt, or a checkpoint of ours."
    )
