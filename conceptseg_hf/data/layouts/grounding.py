"""What the two grounding sets of one owner have in common: their paths, their markup, and how images are named."""

from __future__ import annotations

import re
from pathlib import Path

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NAMED = re.compile(
    rf"\b(?:(?P<word>{'|'.join(_ORDINALS)}|last)\s+image|image\s*-?\s*(?P<number>\d+))\b", re.IGNORECASE
)
_MARKUP = re.compile(r"<image>\s*|<\|[a-z_]+\|>")


def below(root: Path, path: str, folder: str) -> str:
    """A path as the set writes it ("./FOLDER/images/x.png"), relative to the root, be it FOLDER or what holds it."""
    path = path.removeprefix("./")
    if path.startswith(f"{folder}/") and not (root / folder).is_dir():
        return path.removeprefix(f"{folder}/")
    return path


def without_markup(text: str) -> str:
    """A question without image placeholders and special tokens."""
    return " ".join(_MARKUP.sub("", text).split())


def named_image(text: str, count: int) -> int | None:
    """Place of the image that a text names last, or None."""
    place = None
    for match in _NAMED.finditer(text):
        word = (match["word"] or "").lower()
        found = int(match["number"]) - 1 if match["number"] else [*_ORDINALS, "last"].index(word)
        found = count - 1 if word == "last" else found
        if 0 <= found < count:
            place = found
    return place
