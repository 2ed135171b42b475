"""What the VLM writes: think, rule, [check], bbox and answer, each between its tags; reading and writing it.

Boxes are in the "text" frame of ARCHITECTURE.md. The parser reads any string in linear time and evaluates
nothing.
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
# A longer text is no box; the bound keeps the expression above from ever seeing much.
_MAX_BOX_CHARACTERS = 256
_ANY_TAG = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
# Of the template, or anything else that looks like markup: no noun phrase has it.
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>?")


@dataclass(frozen=True)
class Completion:
    """A parsed completion. Fields of missing or malformed parts are None.

    Attributes:
        text: The completion as written.
        think: The reasoning.
        rule: The visual rule.
        check: Box of the proxy query on the mosaic (x1, y1, x2, y2), ordered, in text units.
        bbox: Box of the target in the target image, likewise.
        answer: The noun phrase that SAM 3 gets; one with tags in it is none.
        missing: What is missing or malformed, in words; empty when the template holds.
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
        """Whether the template holds: each part once, in order, with only white space between and around."""
        return not self.missing


def parse_completion(text: str, scale: float | None = None, expect_check: bool | None = None) -> Completion:
    """Reads a completion; never raises, whatever the text.

    Each part is looked for behind the first `</think>`, so that a format quoted while thinking is not taken
    for the answer; failing that, anywhere. Linear in the length of the text.

    Args:
        text: The completion without special tokens. Anything but a string counts as an empty one.
        scale: Largest coordinate (the processor's `coordinate_scale`); boxes are clamped to 0..scale. None
            leaves them as written.
        expect_check: Whether `<check>` must (True) or must not (False) be there; None takes both.

    Returns:
        The parts. Boxes come ordered (x1 <= x2, y1 <= y2).
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
    faults = _structure_faults(text, expect_check) + faults
    return Completion(
        text, contents["think"], contents["rule"], boxes["check"], boxes["bbox"], answer, tuple(faults)
    )


def find_markup(text: str) -> str | None:
    """The first tag in a text, of the template or of any other kind; None if there is none."""
    match = _MARKUP.search(text)
    return None if match is None else match[0]


def find_template_tag(text: str) -> str | None:
    """The first tag of the template in a text; None if there is none."""
    match = _ANY_TAG.search(text)
    return None if match is None else match[0]


def format_completion(
    think: str,
    rule: str,
    check: Sequence[float] | None,
    bbox: Sequence[float] | None,
    answer: str,
    scale: float,
) -> str:
    """Writes a completion: the inverse of `parse_completion`, up to the rounding of `format_box`.

    Args:
        think: The reasoning.
        rule: The visual rule.
        check: Box of the proxy query in text units; None leaves `<check>` out.
        bbox: Box of the target in text units; None, for a concept that is not there, writes the empty box
            [0,0,0,0].
        answer: The noun phrase.
        scale: The processor's `coordinate_scale`.
    """
    parts = [f"<think>{think}</think>", f"<rule>{rule}</rule>"]
    if check is not None:
        parts.append(f"<check>{format_box(check, scale)}</check>")
    parts.append(f"<bbox>{format_box((0.0, 0.0, 0.0, 0.0) if bbox is None else bbox, scale)}</bbox>")
    parts.append(f"<answer>{answer}</answer>")
    return "".join(parts)


def format_box(box: Sequence[float], scale: float) -> str:
    """Writes a box as "[x1,y1,x2,y2]": whole numbers where `scale` exceeds 1, else three decimals."""
    if scale > 1:
        return "[" + ",".join(str(math.floor(value + 0.5)) for value in box) + "]"
    return "[" + ",".join(f"{value:.3f}" for value in box) + "]"


def format_box_list(boxes: Sequence[Sequence[float]], scale: float) -> str:
    """Writes boxes as a list of Python, "[[x1, y1, x2, y2], ...]", their numbers as `format_box` does."""
    listed = (format_box(box, scale).replace(",", ", ") for box in boxes)
    return f"[{', '.join(listed)}]"


def _content(text: str, tag: str, start: int) -> str | None:
    """Text in the first pair `<tag>`, `</tag>` at or behind `start`, stripped; else in the first anywhere."""
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
    if not all(map(math.isfinite, values)):  # "1e999" is a number to the expression and infinite as a float
        return None
    if scale is not None:
        values = [min(max(value, 0.0), float(scale)) for value in values]
    x1, y1, x2, y2 = values
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _structure_faults(text: str, expect_check: bool | None) -> list[str]:
    """Where the text departs from the template's order, in words."""
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
        if not begins and (tag != "check" or expect_check or ends):
            faults.append(f"<{tag}> is missing")
        elif begins > 1 or ends > 1:
            faults.append(f"<{tag}> appears more than once")
        elif begins > ends:
            faults.append(f"<{tag}> is not closed")
        if tag == "check" and begins and expect_check is False:
            faults.append("<check> was not asked for")
    if nested:
        faults.append("tags are nested or close in the wrong place")
    if opened != sorted(opened, key=TAGS.index):
        faults.append("tags are out of order")
    if loose:
        faults.append("there is text outside the tags")
    return faults
