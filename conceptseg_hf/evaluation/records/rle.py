"""Masks as strings in COCO's compressed run-length encoding, which `pycocotools.mask.decode` can read."""

from __future__ import annotations

from typing import Any

import numpy as np


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        `size` [H, W], and `counts`: a string that encodes the lengths of alternating runs of 0 and 1, in column-major
        order and starting with 0.
    """
    pixels = np.asarray(mask, dtype=bool).ravel(order="F")
    boundaries = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = np.concatenate([[0], boundaries, [pixels.size]])
    runs = np.diff(starts).tolist() if pixels.size else []
    if pixels.size and pixels[0]:
        runs = [0, *runs]
    characters = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:  # five bits per character, lowest first; the sixth bit is set if more follow
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            characters.append(chr(48 + bits + 32 * more))
    return {"size": list(np.asarray(mask).shape), "counts": "".join(characters)}


def decode_mask(encoded: dict[str, Any]) -> np.ndarray:
    """Decode a mask that `encode_mask` encoded.

    Raises:
        ValueError: If the runs do not match the size.
    """
    runs: list[int] = []
    value = shift = 0
    for character in encoded["counts"]:
        bits = ord(character) - 48
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
            f"mask: the runs cover {sum(runs)} pixels, but the size is {height} x {width}; the record is damaged, so "
            "run the evaluation again."
        )
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape((height, width), order="F")
