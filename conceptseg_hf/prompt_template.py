"""The prompt template of the VLM, which is saved in processor_config.json and can be customized there.

A template file (`load_prompt_template`, YAML or JSON) contains either the fields of `PromptTemplate`, or frames and
slots:

    system: the system message
    frame: a text with {question} and named slots, such as {ref_bboxes}
    frames: {no_reference: a different frame for this variant}      # optional
    slots: {with_proxy: {ref_bboxes: "Boxes: {reference_box_list}"}, support_only: ..., ...}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .errors import one_line

_PLACEHOLDER = re.compile(r"\{(problem|reference_boxes|reference_box_list)\}")
_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_FRAME_KEYS = ("system", "frame", "frames", "slots")
VARIANTS = ("with_proxy", "support_only", "single_reference", "no_reference")


@dataclass(frozen=True)
class PromptTemplate:
    """Instruction texts, one for each combination of references.

    `{problem}` is replaced by the user's prompt, `{reference_boxes}` by the boxes of the support references in text
    units of the mosaic ("[1,2,3,4], [5,6,7,8]", or "none"), and `{reference_box_list}` by the same boxes as a Python
    list ("[[1, 2, 3, 4], [5, 6, 7, 8]]").

    Attributes:
        system: The system message.
        with_proxy: Instruction for references with a proxy query; requests `<check>`.
        support_only: Instruction for several references with at least one box and without a proxy query.
        single_reference: Instruction for one reference, or several references without boxes.
        no_reference: Instruction for the target image alone.
    """

    system: str
    with_proxy: str
    support_only: str
    single_reference: str
    no_reference: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ValueError(f"PromptTemplate: {field.name} is a {type(value).__name__}; use a string.")
            if field.name != "system" and "{problem}" not in value:
                raise ValueError(
                    f"PromptTemplate: {field.name} lacks {{problem}}; add it as the placeholder of the user's prompt."
                )

    def fill(
        self, variant: str, problem: str, reference_boxes: str = "", reference_box_list: str = ""
    ) -> str:
        """Fill the template for one prompt.

        Args:
            variant: `"with_proxy"`, `"support_only"`, `"single_reference"` or `"no_reference"`.
            problem: The user's prompt, inserted without changes.
            reference_boxes: The support boxes as text.
            reference_box_list: The support boxes as a Python list.
        """
        values = {
            "problem": problem,
            "reference_boxes": reference_boxes,
            "reference_box_list": reference_box_list,
        }
        # A single pass does not replace placeholders inside the user's prompt.
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], getattr(self, variant))

    def to_dict(self) -> dict[str, str]:
        """Return the template as JSON-serializable data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> PromptTemplate:
        """Create a template from a mapping of all fields.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ValueError(f"prompt_template has the fields {sorted(data)}; use exactly {sorted(names)}.")
        return cls(**data)

    @classmethod
    def from_frames(cls, data: Mapping[str, Any]) -> PromptTemplate:
        """Create a template from frames and slots; see the module docstring.

        Raises:
            ValueError: If a key is unknown, a frame is missing, or a slot has no value.
        """
        if unknown := [key for key in data if key not in _FRAME_KEYS]:
            raise ValueError(
                f"prompt template: unknown key {unknown[0]!r}; use one of {', '.join(_FRAME_KEYS)}."
            )
        texts = {}
        for variant in VARIANTS:
            frame = (data.get("frames") or {}).get(variant, data.get("frame"))
            slots = (data.get("slots") or {}).get(variant) or {}
            if not isinstance(frame, str):
                raise ValueError(f"prompt template: no frame for {variant}; set frame or frames.{variant}.")
            texts[variant] = _fill_slots(frame, slots, variant)
        return cls(system=data.get("system"), **texts)  # type: ignore[arg-type]  # validated by __post_init__


def load_prompt_template(path: str | os.PathLike) -> PromptTemplate:
    """Read a template from a YAML or JSON file; see the module docstring for the format.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file does not contain a valid template.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"prompt template {str(path)!r} is not a file; pass a YAML or JSON file with the fields of PromptTemplate."
        )
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise ValueError(
            f"prompt template {str(path)!r} is neither valid YAML nor JSON: {reason}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"prompt template {str(path)!r} contains no fields; use those of PromptTemplate.")
    has_frames = not {"frame", "frames", "slots"}.isdisjoint(content)
    try:
        return PromptTemplate.from_frames(content) if has_frames else PromptTemplate.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


@cache
def released_template() -> PromptTemplate:
    """Return the template with the structure of the released code's prompt and the wording of the paper."""
    return load_prompt_template(Path(__file__).parent / "prompt_templates" / "released.yaml")


def _fill_slots(frame: str, slots: Mapping[str, str], variant: str) -> str:
    """Fill the slots of a frame in a single pass; `{question}` is an alias of `{problem}`."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "question":
            return "{problem}"
        if isinstance(slots.get(name), str):
            return slots[name]
        if _PLACEHOLDER.fullmatch(match[0]):
            return match[0]
        raise ValueError(
            f"prompt template: the frame of {variant} has the slot {match[0]}; set it in slots.{variant}."
        )

    return _SLOT.sub(fill, frame)


_TASK = 'Your task is to locate the object matching "{problem}" in the target image.\n'
_TARGET = "Target image: the image for grounding.\n"
_FORMAT = "Output strictly in the following format: <think>[Your step-by-step analysis and reasoning]</think>"
_RULE = "<rule>Visual rule of the reference targets</rule>"
_CHECK = "<check>[x1, y1, x2, y2]</check>"
_RESULT = (
    "<bbox>[x3, y3, x4, y4]</bbox><answer>concise noun phrase of 1 to 3 words for the target object</answer>"
)
_THINK = "Think through the reasoning process in your mind, induce the visual rule"
_APPLY = "apply this rule to locate the corresponding object in the target image.\n"
_INDUCE = f"{_THINK} of the reference targets, and {_APPLY}"

OFFICIAL_TEMPLATE = PromptTemplate(
    system="You are a helpful assistant.",
    with_proxy=(
        f"{_TASK}Reference image: bounding boxes provided at {{reference_boxes}}.\n{_TARGET}"
        f"{_THINK} and check it by locating the missed bounding box in the top-left region of the "
        f"reference image, {_APPLY}"
        f"{_FORMAT}{_RULE}{_CHECK}{_RESULT}"
    ),
    support_only=(
        f"{_TASK}Reference image: bounding boxes provided at {{reference_boxes}}.\n{_TARGET}"
        f"{_INDUCE}{_FORMAT}{_RULE}{_RESULT}"
    ),
    single_reference=(
        f"{_TASK}Reference image: the image to induce the rule from.\n{_TARGET}"
        f"{_INDUCE}{_FORMAT}{_RULE}{_RESULT}"
    ),
    no_reference=f"{_TASK}{_TARGET}{_THINK}, and {_APPLY}{_FORMAT}<rule>Visual rule</rule>{_RESULT}",
)

_LOCATE = "Think through the reasoning process in your mind, and locate the corresponding object in the target image.\n"
_BOXES = f"{_TASK}Reference image: bounding boxes provided at {{reference_boxes}}.\n{_TARGET}"

TEMPLATE_WITHOUT_META_REASONING = PromptTemplate(
    system=OFFICIAL_TEMPLATE.system,
    with_proxy=f"{_BOXES}{_LOCATE}{_FORMAT}{_RESULT}",
    support_only=f"{_BOXES}{_LOCATE}{_FORMAT}{_RESULT}",
    single_reference=f"{_TASK}Reference image: an image of the object.\n{_TARGET}{_LOCATE}{_FORMAT}{_RESULT}",
    no_reference=f"{_TASK}{_TARGET}{_LOCATE}{_FORMAT}{_RESULT}",
)
"""The official template without rule and check, for the ablation without meta reasoning (Table 4)."""
"""Prompt template of the paper (appendix D.1): task, reference boxes, rule and check, and output format."""
