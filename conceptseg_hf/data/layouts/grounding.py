"""Helpers for MIG-Bench and MGrounding-630k: paths, markup, and images named in text."""

from __future__ import annotations

import re
from pathlib import Path

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NAMED = re.compile(
    rf"\b(?:(?P<ordinal>{'|'.join(_ORDINALS)}|last)\s+image|image\s*-?\s*(?P<number>\d+))\b", re.IGNORECASE
)
_MARKUP = re.compile(r"<image>\s*|<\|[a-z_]+\|>")


def below(root: Path, path: str, folder: str) -> str:
    """Return a path of the dataset ("./FOLDER/images/x.png") relative to `root`, which is FOLDER or its parent."""
    path = path.removeprefix("./")
    if path.startswith(f"{folder}/") and not (root / folder).is_dir():
        return path.removeprefix(f"{folder}/")
    return path


def without_markup(text: str) -> str:
    """Return a question without image placeholders and special tokens."""
    return " ".join(_MARKUP.sub("", text).split())


def named_image(text: str, count: int) -> int | None:
    """Return the index of the image that a text names last, or None."""
    last_index = None
    for match in _NAMED.finditer(text):
        ordinal = (match["ordinal"] or "").lower()
        image_index = int(match["number"]) - 1 if match["number"] else [*_ORDINALS, "last"].index(ordinal)
        image_index = count - 1 if ordinal == "last" else image_index
        if 0 <= image_index < count:
            last_index = image_index
    return last_index
