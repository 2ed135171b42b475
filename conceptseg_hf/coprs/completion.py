"""Completions of CoPRS: the reasoning in `<think>`, then the concentration token."""

from __future__ import annotations

import re

from ..completion import Completion

REF_POS = "<REF_POS>"
"""The concentration token."""

MAX_THINK_CHARACTERS = 2048
_LONG = 0.9

# Linear in the length of the text: each part contains no tag of the template.
_PARTS = re.compile(r"(<think>|</think>|<REF_POS>)")
_TEMPLATE = ["<think>", "</think>", REF_POS]


def parse_reasoning(text: str) -> Completion:
    """Parse a completion; never raises an exception.

    The result is valid if the tags `<think>`, `</think>` and `<REF_POS>` occur once, in this order, with only
    whitespace between `</think>` and `<REF_POS>`.
    """
    if not isinstance(text, str):
        text = ""
    parts = _PARTS.split(text)
    tags = parts[1::2]
    think = parts[2].strip() if len(tags) > 1 and tags[:2] == _TEMPLATE[:2] else None
    faults = []
    if tags != _TEMPLATE:
        faults.append(f"the tags are {''.join(tags) or 'missing'}, not {''.join(_TEMPLATE)}")
    elif parts[4].strip():
        faults.append(f"text between </think> and {REF_POS}")
    return Completion(text, think=think, missing=tuple(faults))


def format_score(text: str) -> float:
    """Score the format of a completion (appendix B.2).

    Returns:
        0 if the completion is invalid (see `parse_reasoning`); 0.9 if the reasoning has more than 2048 characters or
        there is other text before `<think>` or after `<REF_POS>`; otherwise 1.
    """
    if not parse_reasoning(text).is_valid:
        return 0.0
    before, _, think, _, _, _, after = _PARTS.split(text)
    is_long = len(think) > MAX_THINK_CHARACTERS
    return _LONG if is_long or before.strip() or after.strip() else 1.0


def format_reasoning(think: str) -> str:
    """Format a completion; the inverse of `parse_reasoning`."""
    return f"<think>{think}</think>{REF_POS}"
