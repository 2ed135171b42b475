"""Profiles: named bundles of settings of model, processor and evaluation; docs/weights.md has the table.

`"paper"` is what everything does by default. `"released"` is what the code does that the authors published with their
weights, wherever that differs; `conceptseg convert` writes it into the folders that it makes of such weights.

What weights were trained with is no matter of a profile: the canvas, the coordinates' scale, and a prompt template of
one's own stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .configuration_conceptseg import SWITCHES, ConceptSegConfig
from .mosaic import MosaicSettings
from .prompt_template import OFFICIAL_TEMPLATE, PromptTemplate, released_template

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation
    from .processing_conceptseg import ConceptSegProcessor

RELEASED_SIZE = 600
"""Side of the released code's canvas, in pixels."""


@dataclass(frozen=True)
class Profile:
    """A named bundle of settings.

    Attributes:
        name: Its name.
        config: Fields of `ConceptSegConfig`.
        processor: Settings of `ConceptSegProcessor`.
        protocol: How an evaluation compares masks; see `evaluation.protocols`.
        loader: How references of a benchmark's files are drawn, and its masks read; see `data.load_benchmark`.
    """

    name: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    protocol: str
    loader: str


def _usual(name: str) -> Any:
    return ConceptSegConfig.__dataclass_fields__[name].default


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "paper",
            config={name: _usual(name) for name in SWITCHES if name != "profile"},
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
    """A profile by name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PROFILES:
        raise ValueError(f"no profile is named {name!r}; use {' or '.join(PROFILES)}.")
    return PROFILES[name]


def profile_changes(
    name: str, config: ConceptSegConfig, processor: ConceptSegProcessor
) -> dict[str, tuple[Any, Any]]:
    """What a profile would change: setting by setting what it is and what it would be.

    Fields of the mosaic are named "mosaic.grid" and so on; a prompt template is named, not shown.

    Args:
        name: The profile.
        config: The model's config.
        processor: Its processor.

    Raises:
        ValueError: If no profile has that name.
    """
    profile = get_profile(name)
    changes = {key: (getattr(config, key), value) for key, value in profile.config.items()}
    found = processor.mosaic_settings.to_dict()
    changes |= {f"mosaic.{key}": (found[key], value) for key, value in profile.processor["mosaic"].items()}
    changes["shortcut_size"] = (processor.shortcut_size, profile.processor["shortcut_size"])
    template = find_template_profile(processor.template)
    if template is not None:
        changes["prompt_template"] = (template, name)
    return {key: pair for key, pair in changes.items() if pair[0] != pair[1]}


def apply_profile(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, name: str
) -> dict[str, tuple[Any, Any]]:
    """Gives a model and its processor the settings of a profile, in place.

    Both save them: a folder that they are saved to has the profile by itself.

    Args:
        model: The model.
        processor: Its processor.
        name: `"paper"` or `"released"`.

    Returns:
        What has changed; see `profile_changes`.

    Raises:
        ValueError: If no profile has that name.

    Example:
        >>> model = AutoModel.from_pretrained("conceptseg-r1-7b")
        >>> processor = AutoProcessor.from_pretrained("conceptseg-r1-7b")
        >>> apply_profile(model, processor, "paper")["end_of_turn_state"]
        (True, False)
    """
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
    """Lets a model have the settings of a profile for a while.

    Args:
        model: The model, whose config is as before afterwards.
        processor: Its processor, which stays as it is.
        name: The profile; None: all stays as it is.

    Yields:
        The processor of the profile.

    Raises:
        ValueError: If no profile has that name.
    """
    if name is None:
        yield processor
        return
    before = {key: getattr(model.config, key) for key in SWITCHES}
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
    """A profile's name, and what of a run is not as it says, for reports.

    Args:
        name: The profile.
        config: The model's config.
        processor: Its processor.
        protocol: The protocol of the evaluation.
        loader: The loader of the samples; None where they have none.
    """
    profile = get_profile(name)
    differing = {
        key: "another" if key == "prompt_template" else found
        for key, (found, _) in profile_changes(name, config, processor).items()
    }
    if protocol != profile.protocol:
        differing["protocol"] = protocol
    if loader not in (None, profile.loader):
        differing["loader"] = loader
    words = ", ".join(f"{key} {value}" for key, value in differing.items())
    return f"{name} but {words}" if words else name


def _processor_settings(profile: Profile, processor: ConceptSegProcessor) -> dict[str, Any]:
    settings = dict(profile.processor)
    if find_template_profile(processor.template) in (None, profile.name):
        del settings["prompt_template"]
    return settings


def find_template_profile(template: PromptTemplate) -> str | None:
    """The profile that a template belongs to, whatever spaces its system message has around it; None: one's own."""

    def words(data: Mapping[str, str]) -> dict[str, str]:
        return {**data, "system": data["system"].strip()}

    given = words(template.to_dict())
    return next(
        (name for name, profile in PROFILES.items() if words(profile.processor["prompt_template"]) == given),
        None,
    )
