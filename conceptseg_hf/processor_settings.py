"""Validation of the settings of `ConceptSegProcessor` that are saved in processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mosaic import RESAMPLING, MosaicSettings
from .prompt_template import OFFICIAL_TEMPLATE, PromptTemplate
from .vlm_families import DEFAULT_FAMILY, get_family

OPTIONAL_SETTINGS = {
    "mosaic": None,
    "shortcut_size": None,
    "sam_resampling": None,
    "mask_resampling": "bilinear",
    "vlm_family": DEFAULT_FAMILY,
}
"""Optional settings of `ConceptSegProcessor`, saved only if they differ from these default values."""


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate settings of `ConceptSegProcessor` and convert them to JSON-serializable values.

    Raises:
        ValueError: If a setting is unknown or its value is invalid.
    """
    checked = dict(settings)
    for name, value in settings.items():
        if name in ("canvas_size", "coordinate_scale", "sam_text_length", "shortcut_size"):
            if not (name == "shortcut_size" and value is None) and not value > 0:
                raise ValueError(f"ConceptSegProcessor: {name} is {value}; use a positive number.")
            if value is not None:
                checked[name] = float(value) if name == "coordinate_scale" else int(value)
        elif name == "prompt_template":
            template = OFFICIAL_TEMPLATE if value is None else value
            if not isinstance(template, PromptTemplate):
                template = PromptTemplate.from_dict(template)
            checked[name] = template.to_dict()
        elif name == "mosaic":
            mosaic = value if isinstance(value, MosaicSettings) else MosaicSettings.from_dict(value or {})
            checked[name] = None if mosaic == MosaicSettings() else mosaic.to_dict()
        elif name in ("sam_resampling", "mask_resampling"):
            if value not in RESAMPLING and not (name == "sam_resampling" and value is None):
                raise ValueError(
                    f"ConceptSegProcessor: {name} is {value!r}; use {' or '.join(map(repr, RESAMPLING))}."
                )
        elif name == "vlm_family":
            get_family(value)  # raises an error for families that are not supported
        else:
            raise ValueError(
                f"ConceptSegProcessor: unknown setting {name!r}; use an argument of the class from canvas_size on."
            )
    return checked
