"""The instruction the VLM gets, as data: saved in processor_config.json, where it can be replaced.

A file of one (`load_prompt_template`, YAML or JSON) holds the fields of `PromptTemplate`, or frames and slots:

    system: the system message
    frame: a text with {question} and slots of any name, such as {ref_bboxes}
    frames: {no_reference: another text for that variant}      # where there are others
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
    """The texts around a prompt, one for each way references can be given.

    `{problem}` stands for the user's words; `{reference_boxes}` for the boxes of the support references, in text units
    of the mosaic: "[1,2,3,4], [5,6,7,8]", or "none"; `{reference_box_list}` for the same as a list of Python:
    "[[1, 2, 3, 4], [5, 6, 7, 8]]".

    Attributes:
        system: The system message.
        with_proxy: References, one of which is the proxy query: asks for `<check>`.
        support_only: Several references with at least one box, no proxy query.
        single_reference: One reference, or several without any box: no list of boxes.
        no_reference: The target image alone.
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
                raise ValueError(f"PromptTemplate: {field.name} is a {type(value).__name__}; give a string.")
            if field.name != "system" and "{problem}" not in value:
                raise ValueError(
                    f"PromptTemplate: {field.name} lacks {{problem}}; say where the user's words go."
                )

    def fill(
        self, variant: str, problem: str, reference_boxes: str = "", reference_box_list: str = ""
    ) -> str:
        """The instruction of one prompt.

        Args:
            variant: `"with_proxy"`, `"support_only"`, `"single_reference"` or `"no_reference"`.
            problem: The user's words, inserted as they are.
            reference_boxes: The support boxes as text.
            reference_box_list: The same as a list of Python.
        """
        values = {
            "problem": problem,
            "reference_boxes": reference_boxes,
            "reference_box_list": reference_box_list,
        }
        # One pass, so that a placeholder inside the user's words stays what it is.
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], getattr(self, variant))

    def to_dict(self) -> dict[str, str]:
        """The template as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> PromptTemplate:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a text is missing or a field is unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ValueError(f"prompt_template has the fields {sorted(data)}; give exactly {sorted(names)}.")
        return cls(**data)

    @classmethod
    def from_frames(cls, data: Mapping[str, Any]) -> PromptTemplate:
        """A template of frames and slots; see above.

        Raises:
            ValueError: If a key is unknown, a text is missing, or a slot has nothing to fill it.
        """
        if unknown := [key for key in data if key not in _FRAME_KEYS]:
            raise ValueError(
                f"prompt template: {unknown[0]!r} means nothing here; use {', '.join(_FRAME_KEYS)}."
            )
        texts = {}
        for variant in VARIANTS:
            frame = (data.get("frames") or {}).get(variant, data.get("frame"))
            slots = (data.get("slots") or {}).get(variant) or {}
            if not isinstance(frame, str):
                raise ValueError(f"prompt template: there is no frame for {variant}; give frame, or frames.")
            texts[variant] = _fill_slots(frame, slots, variant)
        return cls(system=data.get("system"), **texts)  # type: ignore[arg-type]  # checked there


def load_prompt_template(path: str | os.PathLike) -> PromptTemplate:
    """Reads a template from a YAML or JSON file; see above for what it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a template.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"prompt template {str(path)!r} is not a file; give one of YAML or JSON with the fields of PromptTemplate."
        )
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise ValueError(f"prompt template {str(path)!r} is neither YAML nor JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"prompt template {str(path)!r} holds no fields; give those of PromptTemplate.")
    has_frames = not {"frame", "frames", "slots"}.isdisjoint(content)
    try:
        return PromptTemplate.from_frames(content) if has_frames else PromptTemplate.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


@cache
def released_template() -> PromptTemplate:
    """The structure of the released code's prompt, with the paper's words in it."""
    return load_prompt_template(Path(__file__).parent / "prompt_templates" / "released.yaml")


def _fill_slots(frame: str, slots: Mapping[str, str], variant: str) -> str:
    """A frame with its slots filled, in one pass; `{question}` is another name of `{problem}`."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name == "question":
            return "{problem}"
        if isinstance(slots.get(name), str):
            return slots[name]
        if _PLACEHOLDER.fullmatch(match[0]):
            return match[0]
        raise ValueError(
            f"prompt template: the frame of {variant} has the slot {match[0]}, which slots.{variant} does not fill."
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
"""The protocol of the paper (appendix D.1): task, reference boxes, rule and its check, output format."""
