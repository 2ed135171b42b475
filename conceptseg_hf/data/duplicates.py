"""Images of a split that are exact or near duplicates of training images.

An exact duplicate has the same pixels after decoding. A near duplicate has nearly the same perceptual hash: the signs
of 255 low-frequency DCT coefficients relative to their median ("pHash" at 16 x 16), which survive resizing, compression
and changes of brightness. docs/photos.md states how the distance was chosen and what such pairs look like. Copies that
are mirrored, or cropped by 5 % or more, are not found.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..images import load_image
from ..progress import progress_bar
from .files import FileBenchmark
from .paths import read_text

BITS = 255
MAX_DISTANCE = 40
"""Bits that may differ between near duplicates. In the photographs of docs/photos.md, 99 % of the copies that were
resized or compressed differ by at most 30 bits, and the closest pair of different scenes by 46."""

_SIDE, _FREQUENCIES = 64, 16
_MIN_CONTRAST = 2.0  # gray levels; the hash of a uniform image would consist of noise
_BLOCK = 1024  # images that are compared at once
_MAX_LISTED = 3  # pairs listed for each dataset


@dataclass(frozen=True)
class Fingerprint:
    """What identifies an image.

    Attributes:
        digest: Hash of size and pixels.
        bits: (255,) bool perceptual hash; None for a nearly uniform image.
    """

    digest: bytes
    bits: np.ndarray | None


@dataclass(frozen=True)
class Duplicate:
    """An image of a split and the training image that is most similar to it.

    Attributes:
        sample_ids: Samples of the image.
        dataset: Their dataset.
        image: The image.
        train_image: The training image.
        distance: Number of bits of the perceptual hashes that differ.
        is_exact: Whether all pixels are equal.
    """

    sample_ids: tuple[str, ...]
    dataset: str
    image: Path
    train_image: Path
    distance: int
    is_exact: bool


@dataclass(frozen=True)
class Duplicates:
    """Duplicates of training images in one split.

    Attributes:
        images: Name of each dataset and its number of images, in the order of the split.
        found: The duplicates, exact ones first, then by distance.
    """

    images: tuple[tuple[str, int], ...]
    found: tuple[Duplicate, ...]

    def lines(self, root: Path) -> list[str]:
        """Return the report, line by line, with paths relative to `root`."""
        total = sum(count for _, count in self.images)
        exact = sum(pair.is_exact for pair in self.found)
        kinds = f"{exact} exact, {len(self.found) - exact} near"
        lines = [
            f"  duplicates: {len(self.found)} of {total} images are duplicates of training images ({kinds})"
        ]
        for dataset, count in self.images:
            pairs = [pair for pair in self.found if pair.dataset == dataset]
            if not pairs:
                continue
            exact = sum(pair.is_exact for pair in pairs)
            lines.append(f"    {dataset}: {len(pairs)} of {count} ({exact} exact, {len(pairs) - exact} near)")
            for pair in pairs[:_MAX_LISTED]:
                names = (os.path.relpath(path, root) for path in (pair.image, pair.train_image))
                how = "exact" if pair.is_exact else f"{pair.distance} of {BITS} bits differ"
                lines.append(f"      {' = '.join(names)} ({how})")
            if len(pairs) > _MAX_LISTED:
                lines.append(f"      and {len(pairs) - _MAX_LISTED} more")
        return lines


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB image."""
    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    gray = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    if gray.std() < _MIN_CONTRAST:
        return Fingerprint(digest, None)
    frequencies = (_DCT @ gray @ _DCT.T).ravel()[1:]  # without the mean brightness
    return Fingerprint(digest, frequencies > np.median(frequencies))


def fingerprints(images: Sequence[Path], progress: str | None = None) -> list[Fingerprint | None]:
    """Return the fingerprints of image files; None for a file that cannot be read.

    Args:
        images: The files.
        progress: Description of the progress bar; None shows no progress bar.
    """
    results = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
        nullcontext() if progress is None else progress_bar(len(images), "images", progress) as bar,
    ):
        for start in range(0, len(images), _BLOCK):
            for result in threads.map(_fingerprint_file, images[start : start + _BLOCK]):
                results.append(result)
                if bar is not None:
                    bar.update()
    return results


def find_duplicates(
    samples: FileBenchmark,
    train: FileBenchmark,
    progress: str | None = None,
    max_distance: int = MAX_DISTANCE,
) -> Duplicates:
    """Compare each image of a split with all training images, of all datasets.

    Files that cannot be read are skipped.

    Args:
        samples: The split.
        train: The training split.
        progress: Description of the progress bar; None shows no progress bar.
        max_distance: Number of bits that may differ.
    """
    ids: dict[Path, list[str]] = {}
    datasets: dict[Path, str] = {}
    for item in samples.items:
        ids.setdefault(item.image, []).append(item.sample_id)
        datasets.setdefault(item.image, item.dataset or samples.name)
    train_images = list(dict.fromkeys(item.image for item in train.items))
    paths = list(dict.fromkeys([*ids, *train_images]))
    known = dict(zip(paths, fingerprints(paths, progress), strict=True))
    matches = nearest([known[path] for path in ids], [known[path] for path in train_images])
    found = [
        Duplicate(tuple(ids[path]), datasets[path], path, train_images[match[0]], match[1], match[2])
        for path, match in zip(ids, matches, strict=True)
        if match is not None and (match[2] or match[1] <= max_distance)
    ]
    found.sort(key=lambda pair: (not pair.is_exact, pair.distance))
    return Duplicates(tuple(Counter(datasets.values()).items()), tuple(found))


def read_sample_ids(path: str | os.PathLike) -> list[str]:
    """Read sample ids from a .csv file with a column `sample_id`, or from a text file with one id per line.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not text.
    """
    lines = read_text(Path(path)).splitlines()
    header = next(csv.reader(lines), [])
    if "sample_id" in header:
        return [row["sample_id"] for row in csv.DictReader(lines) if row["sample_id"]]
    return [line.strip() for line in lines if line.strip()]


def nearest(
    images: Sequence[Fingerprint | None], others: Sequence[Fingerprint | None]
) -> list[tuple[int, int, bool] | None]:
    """Return for each image the most similar one of others.

    Returns:
        Its index, the number of bits that differ, and whether it is an exact duplicate; None if nothing is comparable.
    """
    by_digest: dict[bytes, int] = {}
    for index, other in enumerate(others):
        if other is not None:
            by_digest.setdefault(other.digest, index)
    matches: list[tuple[int, int, bool] | None] = [
        None if image is None or image.digest not in by_digest else (by_digest[image.digest], 0, True)
        for image in images
    ]
    pending = [
        i
        for i, image in enumerate(images)
        if matches[i] is None and image is not None and image.bits is not None
    ]
    comparable = [i for i, other in enumerate(others) if other is not None and other.bits is not None]
    if not pending or not comparable:
        return matches
    other_signs = _signs(others[i] for i in comparable)
    for start in range(0, len(pending), _BLOCK):
        block = pending[start : start + _BLOCK]
        distances = (BITS - _signs(images[i] for i in block) @ other_signs.T) / 2
        for i, row in zip(block, distances, strict=True):
            closest = int(row.argmin())
            matches[i] = comparable[closest], int(row[closest]), False
    return matches


def _signs(prints: Iterable[Fingerprint | None]) -> np.ndarray:
    """Return (N, 255) hashes as -1 and 1, so that matrix products count equal bits."""
    bits = [each.bits for each in prints if each is not None and each.bits is not None]
    return np.where(bits, 1, -1).astype(np.float32)


def _fingerprint_file(path: Path) -> Fingerprint | None:
    try:
        return fingerprint(load_image(path))
    except (OSError, ValueError):
        return None


def _dct_matrix() -> np.ndarray:
    """Return the first rows of the orthogonal DCT-II matrix, (16, 64), up to a common factor."""
    frequency, position = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None]
    matrix = np.cos(np.pi * frequency * (2 * position + 1) / (2 * _SIDE))
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _dct_matrix()

__all__ = [
    "MAX_DISTANCE",
    "Duplicate",
    "Duplicates",
    "Fingerprint",
    "find_duplicates",
    "fingerprint",
    "fingerprints",
    "nearest",
    "read_sample_ids",
]
