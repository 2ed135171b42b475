"""Profiles: named sets of model, processor and evaluation settings, listed in docs/weights.md.

`"paper"` contains the default settings. `"released"` follows the code that the authors published with their weights;
`conceptseg convert` applies it to checkpoints converted from these weights.

A profile does not change settings that the weights were trained with: the canvas size, the coordinate scale, and a
custom prompt template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .configuration_conceptseg import PROFILE_FIELDS, ConceptSegConfig
from .mosaic import MosaicSettings
from .prompt_template import OFFICIAL_TEMPLATE, PromptTemplate, released_template

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation
    from .processing_conceptseg import ConceptSegProcessor

RELEASED_SIZE = 600
"""Canvas size of the released code, in pixels."""


@dataclass(frozen=True)
class Profile:
    """A named set of settings.

    Attributes:
        name: Name of the profile.
        config: Fields of `ConceptSegConfig`.
        processor: Settings of `ConceptSegProcessor`.
        protocol: Evaluation protocol for comparing masks; see `evaluation.protocols`.
        loader: Loader of benchmark files, which samples references and reads masks; see `data.load_benchmark`.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    protocol: str
    loader: str


def _config_default(name: str) -> Any:
    return ConceptSegConfig.__dataclass_fields__[name].default


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "paper",
            config={name: _config_default(name) for name in PROFILE_FIELDS},
            processor={
                "mosaic": MosaicSettings().to_dict(),
                "shortcut_size": None,
                "prompt_template": OFFICIAL_TEMPLATE.to_dict(),
            },
            protocol="standard",
            loader="default",
        ),
        Profile(
            "released",
            config={
                "end_of_turn_state": True,
                "router_drop_parentheses": True,
                "router_min_words": 0,
                "missing_answer": "empty",
                "max_total_length": 2048 + 768,
            },
            processor={
                "mosaic": MosaicSettings(
                    grid=2,
                    resampling="bilinear",
                    boxes_from="cell",
                    corners="inclusive",
                    mark_single=False,
                    several_boxes="enclosing",
                ).to_dict(),
                "shortcut_size": RELEASED_SIZE,
                "prompt_template": released_template().to_dict(),
            },
            protocol="released",
            loader="released",
        ),
    )
}


def get_profile(name: str) -> Profile:
    """Return a profile by name.

    Raises:
        ValueError: If the profile is unknown.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; use {' or '.join(PROFILES)}.")
    return PROFILES[name]


def profile_changes(
    name: str, config: ConceptSegConfig, processor: ConceptSegProcessor
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a profile would change, as pairs of current and new values.

    Mosaic settings have the prefix "mosaic.", and prompt templates are represented by the name of their profile.

    Args:
        name: Name of the profile.
        config: The model's config.
        processor: The model's processor.

    Raises:
        ValueError: If the profile is unknown.
    """
    profile = get_profile(name)
    changes = {key: (getattr(config, key), value) for key, value in profile.config.items()}
    mosaic = processor.mosaic_settings.to_dict()
    changes |= {f"mosaic.{key}": (mosaic[key], value) for key, value in profile.processor["mosaic"].items()}
    changes["shortcut_size"] = (processor.shortcut_size, profile.processor["shortcut_size"])
    template = find_template_profile(processor.template)
    if template is not None:
        changes["prompt_template"] = (template, name)
    return {key: pair for key, pair in changes.items() if pair[0] != pair[1]}


def _check_model(model: ConceptSegForSegmentation) -> None:
    if model.config.model_type != "conceptseg":
        raise ValueError(
            f"profiles are settings of ConceptSeg, but the model is a {type(model).__name__}; omit the profile."
        )


def apply_profile(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, name: str
) -> dict[str, tuple[Any, Any]]:
    """Apply the settings of a profile to a model and its processor, in place.

    The settings are saved with the model and the processor.

    Args:
        model: The model.
        processor: The model's processor.
        name: `"paper"` or `"released"`.

    Returns:
        The changed settings; see `profile_changes`.

    Raises:
        ValueError: If the profile is unknown.

    Example:
        >>> model = AutoModel.from_pretrained("conceptseg-r1-7b")
        >>> processor = AutoProcessor.from_pretrained("conceptseg-r1-7b")
        >>> apply_profile(model, processor, "paper")["end_of_turn_state"]
        (True, False)
    """
    _check_model(model)
    changes = profile_changes(name, model.config, processor)
    profile = get_profile(name)
    for key, value in profile.config.items():
        setattr(model.config, key, value)
    model.config.profile = name
    settings = _processor_settings(profile, processor)
    changed = processor.with_settings(**settings)
    for key in settings:
        setattr(processor, key, getattr(changed, key))
    return changes


@contextmanager
def using_profile(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, name: str | None
) -> Iterator[ConceptSegProcessor]:
    """Apply a profile to a model within the context and restore the model's config afterwards.

    Args:
        model: The model.
        processor: The model's processor, which is not modified.
        name: Name of the profile; None to apply no profile.

    Yields:
        A processor with the settings of the profile.

    Raises:
        ValueError: If the profile is unknown.
    """
    if name is None:
        yield processor
        return
    _check_model(model)
    before = {key: getattr(model.config, key) for key in ("profile", *PROFILE_FIELDS)}
    changed = processor.with_settings()  # a copy
    try:
        apply_profile(model, changed, name)
        yield changed
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


def describe_profile(
    name: str, config: ConceptSegConfig, processor: ConceptSegProcessor, protocol: str, loader: str | None
) -> str:
    """Describe a profile and the settings of a run that differ from it, for reports.

    Args:
        name: Name of the profile.
        config: The model's config.
        processor: The model's processor.
        protocol: Protocol of the evaluation.
        loader: Loader of the samples, or None.
    """
    profile = get_profile(name)
    differing = {
        key: "another" if key == "prompt_template" else current
        for key, (current, _) in profile_changes(name, config, processor).items()
    }
    if protocol != profile.protocol:
        differing["protocol"] = protocol
    if loader not in (None, profile.loader):
        differing["loader"] = loader
    differences = ", ".join(f"{key} {value}" for key, value in differing.items())
    return f"{name} but {differences}" if differences else name


def _processor_settings(profile: Profile, processor: ConceptSegProcessor) -> dict[str, Any]:
    settings = dict(profile.processor)
    if find_template_profile(processor.template) in (None, profile.name):
        del settings["prompt_template"]
    return settings


def find_template_profile(template: PromptTemplate) -> str | None:
    """Return the profile of a template, ignoring whitespace around its system message; None for a custom template."""

    def normalize(data: Mapping[str, str]) -> dict[str, str]:
        return {**data, "system": data["system"].strip()}

    normalized = normalize(template.to_dict())
    for name, profile in PROFILES.items():
        if normalize(profile.processor["prompt_template"]) == normalized:
            return name
    return None
