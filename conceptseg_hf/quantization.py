"""Quantised loading: the VLM only. SAM 3 and the CTM decide the mask, and are small beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .devices import OFFLOADED

UNQUANTIZED_MODULES = ("sam", "ctm", "lm_head")
"""Modules that no quantisation touches."""

# What the configurations of Transformers call the modules they leave alone (bitsandbytes; torchao and others).
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def exclude_sam_and_ctm(quantization_config: Any, device_map: Any = None) -> Any:
    """A quantisation that leaves SAM 3, the CTM and the language-model head as they are.

    Args:
        quantization_config: What `from_pretrained` takes: one of Transformers' configurations, or its dictionary.
        device_map: What `from_pretrained` takes.

    Returns:
        A copy with `UNQUANTIZED_MODULES` among the modules that are skipped. It allows to offload them: bitsandbytes
        refuses that otherwise, as it cannot offload modules that it quantises.

    Raises:
        ValueError: If this kind of quantisation cannot leave modules out.
    """
    if isinstance(quantization_config, Mapping):
        from transformers.quantizers.auto import AutoQuantizationConfig

        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    field = next((name for name in _SKIP_FIELDS if hasattr(quantization_config, name)), None)
    if field is None:
        raise ValueError(
            f"quantization_config is a {type(quantization_config).__name__}, which cannot leave SAM 3 out; use "
            "BitsAndBytesConfig or TorchAoConfig."
        )
    spared = copy.deepcopy(quantization_config)
    setattr(spared, field, list(dict.fromkeys([*(getattr(spared, field) or ()), *UNQUANTIZED_MODULES])))
    if _offloads_kept_modules_only(device_map) and hasattr(spared, "llm_int8_enable_fp32_cpu_offload"):
        spared.llm_int8_enable_fp32_cpu_offload = True
    return spared


def _offloads_kept_modules_only(device_map: Any) -> bool:
    """Whether a device map has an accelerator, and offloads nothing but `UNQUANTIZED_MODULES`."""
    if not isinstance(device_map, Mapping):
        return False
    offloaded = [name for name, device in device_map.items() if str(device) in OFFLOADED]
    return len(offloaded) < len(device_map) and all(name.split(".")[0] in UNQUANTIZED_MODULES for name in offloaded)
