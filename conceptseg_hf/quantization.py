"""Quantized loading of the VLM only. SAM 3 and the CTM determine the mask and are small in comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from .devices import OFFLOADED

UNQUANTIZED_MODULES = ("sam", "ctm", "lm_head")
"""Modules that are never quantized."""

# Fields with the skipped modules in the quantization configs of Transformers (bitsandbytes; torchao and others).
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def exclude_sam_and_ctm(quantization_config: Any, device_map: Any = None) -> Any:
    """Exclude SAM 3, the CTM and the language-model head from a quantization config; see `exclude_modules`."""
    return exclude_modules(quantization_config, device_map, UNQUANTIZED_MODULES)


def exclude_modules(quantization_config: Any, device_map: Any, unquantized: Sequence[str]) -> Any:
    """Exclude modules from a quantization config.

    Args:
        quantization_config: Argument of `from_pretrained`: a quantization config of Transformers, or its dictionary.
        device_map: Argument of `from_pretrained`.
        unquantized: Names of the modules.

    Returns:
        A copy that skips these modules. If the device map offloads only these modules, the copy permits
        offloading, which bitsandbytes rejects by default because it cannot offload quantized modules.

    Raises:
        ValueError: If this type of quantization cannot skip modules.
    """
    if isinstance(quantization_config, Mapping):
        from transformers.quantizers.auto import AutoQuantizationConfig

        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    field = next((name for name in _SKIP_FIELDS if hasattr(quantization_config, name)), None)
    if field is None:
        raise ValueError(
            f"quantization_config is a {type(quantization_config).__name__}, which cannot skip SAM 3; use "
            "BitsAndBytesConfig or TorchAoConfig."
        )
    config = copy.deepcopy(quantization_config)
    setattr(config, field, list(dict.fromkeys([*(getattr(config, field) or ()), *unquantized])))
    if _offloads_kept_modules_only(device_map, unquantized) and hasattr(
        config, "llm_int8_enable_fp32_cpu_offload"
    ):
        config.llm_int8_enable_fp32_cpu_offload = True
    return config


def _offloads_kept_modules_only(device_map: Any, unquantized: Sequence[str]) -> bool:
    """Whether a device map contains an accelerator and offloads only unquantized modules."""
    if not isinstance(device_map, Mapping):
        return False
    offloaded = [name for name, device in device_map.items() if str(device) in OFFLOADED]
    return len(offloaded) < len(device_map) and all(name.split(".")[0] in unquantized for name in offloaded)
