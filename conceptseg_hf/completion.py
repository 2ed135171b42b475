"""Parsing and formatting of VLM completions, which consist of tagged parts: think, rule, [check], bbox and answer.

Boxes are in the "text" frame of ARCHITECTURE.md. The parser accepts any string, runs in linear time and does not
evaluate code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .boxes import Box

TAGS = ("think", "rule", "check", "bbox", "answer")
_BOX_TAGS = ("check", "bbox")

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({_NUMBER})"] * 4) + r"\s*\]", re.ASCII)
# Longer strings are not parsed as boxes, since matching the expression is not linear in their length.
_MAX_BOX_CHARACTERS = 256
_ANY_TAG = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
# Template tags and other markup, which a noun phrase must not contain.
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>?")


@dataclass(frozen=True)
class Completion:
    """A parsed completion. Fields of missing or malformed parts are None.

    Attributes:
        text: The unparsed completion.
        think: The reasoning.
        rule: The visual rule.
        check: Box of the proxy query on the mosaic (x1, y1, x2, y2), ordered, in text units.
        bbox: Box of the target in the target image (x1, y1, x2, y2), ordered, in text units.
        answer: The noun phrase that prompts SAM 3; None if it contains tags.
        missing: Descriptions of missing or malformed parts; empty if the completion follows the template.
    """

    text: str
    think: str | None = None
    rule: str | None = None
    check: Box | None = None
    bbox: Box | None = None
    answer: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether the completion follows the template: each part once, in order, with only whitespace between parts."""
        return not self.missing


def parse_completion(
    text: str, scale: float | None = None, expect_check: bool | None = None, expect_rule: bool = True
) -> Completion:
    """Parse a completion; never raises an exception.

    Parts are searched after the first `</think>`, so that tags quoted in the reasoning are not mistaken for the answer.
    A part that is not found there is searched in the whole text. Runs in linear time.

    Args:
        text: The completion without special tokens. Values that are not strings are treated as an empty string.
        scale: Maximum coordinate (the processor's `coordinate_scale`); boxes are clamped to 0..scale. None to disable
            clamping.
        expect_check: Whether `<check>` is required (True), forbidden (False) or optional (None).
        expect_rule: Whether `<rule>` is required (True) or forbidden (False, the ablation without meta reasoning).

    Returns:
        The parsed completion. Boxes are ordered (x1 <= x2, y1 <= y2).
    """
    if not isinstance(text, str):
        text = ""
    thought_end = max(text.find("</think>"), 0)
    contents = {tag: _content(text, tag, 0 if tag == "think" else thought_end) for tag in TAGS}
    faults: list[str] = []
    boxes: dict[str, Box | None] = {}
    for tag in _BOX_TAGS:
        boxes[tag] = _parse_box(contents[tag], scale)
        if contents[tag] is not None and boxes[tag] is None:
            faults.append(f"<{tag}> does not hold a box [x1,y1,x2,y2]")
    answer = contents["answer"]
    if answer == "":
        faults.append("<answer> is empty")
        answer = None
    elif answer is not None and (markup := find_markup(answer)) is not None:
        faults.append(f"<answer> holds {markup}")
        answer = None
    faults = _structure_faults(text, expect_check, expect_rule) + faults
    return Completion(
        text, contents["think"], contents["rule"], boxes["check"], boxes["bbox"], answer, tuple(faults)
    )


def find_markup(text: str) -> str | None:
    """Return the first tag in a text, including markup outside the template; None if there is none."""
    match = _MARKUP.search(text)
    return None if match is None else match[0]


def find_template_tag(text: str) -> str | None:
    """Return the first template tag in a text; None if there is none."""
    match = _ANY_TAG.search(text)
    return None if match is None else match[0]


def format_completion(
    think: str,
    rule: str | None,
    check: Sequence[float] | None,
    bbox: Sequence[float] | None,
    answer: str,
    scale: float,
) -> str:
    """Format a completion; the inverse of `parse_completion`, up to the rounding of `format_box`.

    Args:
        think: The reasoning.
        rule: The visual rule; None to omit `<rule>`.
        check: Box of the proxy query in text units; None to omit `<check>`.
        bbox: Box of the target in text units; None, for an absent concept, is written as the empty box [0,0,0,0].
        answer: The noun phrase.
        scale: The processor's `coordinate_scale`.
    """
    parts = [f"<think>{think}</think>"]
    if rule is not None:
        parts.append(f"<rule>{rule}</rule>")
    if check is not None:
        parts.append(f"<check>{format_box(check, scale)}</check>")
    parts.append(f"<bbox>{format_box((0.0, 0.0, 0.0, 0.0) if bbox is None else bbox, scale)}</bbox>")
    parts.append(f"<answer>{answer}</answer>")
    return "".join(parts)


def format_start(think: str, rule: str, with_check: bool) -> str:
    """Format the start of a completion, up to the bracket of its first box.

    The text does not end with ">", which some tokenizers merge with the "<" of the next tag.

    Args:
        think: The reasoning.
        rule: The visual rule.
        with_check: Whether `<check>` follows the rule.
    """
    return f"<think>{think}</think><rule>{rule}</rule><{'check' if with_check else 'bbox'}>["


def format_box(box: Sequence[float], scale: float) -> str:
    """Format a box as "[x1,y1,x2,y2]": integers if `scale` is above 1, otherwise three decimals."""
    if scale > 1:
        return "[" + ",".join(str(math.floor(value + 0.5)) for value in box) + "]"
    return "[" + ",".join(f"{value:.3f}" for value in box) + "]"


def format_box_list(boxes: Sequence[Sequence[float]], scale: float) -> str:
    """Format boxes as a Python list, "[[x1, y1, x2, y2], ...]", with the number format of `format_box`."""
    formatted = (format_box(box, scale).replace(",", ", ") for box in boxes)
    return f"[{', '.join(formatted)}]"


def _content(text: str, tag: str, start: int) -> str | None:
    """Return the stripped text of the first `<tag>`, `</tag>` pair from `start` on, else of the first pair overall."""
    for begin in dict.fromkeys((start, 0)):
        opening = text.find(f"<{tag}>", begin)
        if opening < 0:
            continue
        closing = text.find(f"</{tag}>", opening)
        if closing >= 0:
            return text[opening + len(tag) + 2 : closing].strip()
    return None


def _parse_box(content: str | None, scale: float | None) -> Box | None:
    if content is None or len(content) > _MAX_BOX_CHARACTERS:
        return None
    match = _BOX.fullmatch(content)
    if match is None:
        return None
    values = [float(number) for number in match.groups()]
    if not all(map(math.isfinite, values)):  # "1e999" matches the expression but is infinite
        return None
    if scale is not None:
        values = [min(max(value, 0.0), float(scale)) for value in values]
    x1, y1, x2, y2 = values
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _structure_faults(text: str, expect_check: bool | None, expect_rule: bool) -> list[str]:
    """Describe the deviations of a text from the structure of the template."""
    faults: list[str] = []
    opened: list[str] = []  # tags in the order they open
    counts = {(slash, tag): 0 for slash in ("", "/") for tag in TAGS}
    inside: str | None = None
    position = 0
    loose = nested = False
    for match in _ANY_TAG.finditer(text):
        slash, tag = match.groups()
        counts[slash, tag] += 1
        between = text[position : match.start()]
        if inside is None:
            loose = loose or bool(between.strip())
        position = match.end()
        if not slash:
            nested = nested or inside is not None
            opened.append(tag)
            inside = tag
        else:
            nested = nested or inside != tag
            inside = None
    loose = loose or bool(text[position:].strip())
    for tag in TAGS:
        begins, ends = counts["", tag], counts["/", tag]
        required = {"check": expect_check, "rule": expect_rule}.get(tag, True)
        if not begins and (required or ends):
            faults.append(f"<{tag}> is missing")
        elif begins > 1 or ends > 1:
            faults.append(f"<{tag}> appears more than once")
        elif begins > ends:
            faults.append(f"<{tag}> is not closed")
        if begins and required is False:
            faults.append(f"<{tag}> was not asked for")
    if nested:
        faults.append("tags are nested or close in the wrong place")
    if opened != sorted(opened, key=TAGS.index):
        faults.append("tags are out of order")
    if loose:
        faults.append("there is text outside the tags")
    return faults
