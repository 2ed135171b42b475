"""Families of VLMs; the rest of the package accesses the VLM only through the `VlmFamily` of its configuration."""

from transformers import PreTrainedConfig

from .family import Vlm, VlmFamily
from .internvl import InternVlFamily
from .qwen2_5_vl import Qwen2_5VlFamily
from .qwen3_vl import Qwen3VlFamily

FAMILIES: dict[str, VlmFamily] = {
    family.model_type: family for family in (Qwen2_5VlFamily(), Qwen3VlFamily(), InternVlFamily())
}
"""The supported families, by the `model_type` of their configurations."""

DEFAULT_FAMILY = Qwen2_5VlFamily.model_type


def get_family(vlm: PreTrainedConfig | str) -> VlmFamily:
    """Return the family of a VLM.

    Args:
        vlm: The VLM's configuration (`config.vlm_config` or `vlm.config`), or its `model_type`.

    Raises:
        ValueError: If the family is not supported.
    """
    model_type = vlm if isinstance(vlm, str) else vlm.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"The VLM's model_type {model_type!r} is not supported; use one of "
            f"{', '.join(map(repr, FAMILIES))}, or add a family as docs/families.md describes."
        )
    return FAMILIES[model_type]


__all__ = ["DEFAULT_FAMILY", "FAMILIES", "Vlm", "VlmFamily", "get_family"]
