"""Masks as text: COCO's compressed run-length encoding, which `pycocotools.mask.decode` reads as well."""

from __future__ import annotations

from typing import Any

import numpy as np


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        `size` [H, W], and `counts`: the lengths of the runs of 0 and 1 in turn, column by column and 0 first, as text.
    """
    pixels = np.asarray(mask, dtype=bool).ravel(order="F")
    borders = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = np.concatenate([[0], borders, [pixels.size]])
    runs = np.diff(starts).tolist() if pixels.size else []
    if pixels.size and pixels[0]:
        runs = [0, *runs]
    text = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:  # five bits at a time, the lowest first; a sixth says that there are more
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return {"size": list(np.asarray(mask).shape), "counts": "".join(text)}


def decode_mask(encoded: dict[str, Any]) -> np.ndarray:
    """Inverts `encode_mask`.

    Raises:
        ValueError: If the runs do not fill the size.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in encoded["counts"]:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    height, width = encoded["size"]
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(
            f"mask: its runs fill {sum(runs)} pixels, its size is {height} x {width}; the record is damaged, "
            "so evaluate anew."
        )
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape((height, width), order="F")
