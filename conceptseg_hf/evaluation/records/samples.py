"""The samples of an evaluation: reading a sample, and identifying samples without decoding images.

Records are resumed only with the samples they were made from. The identity of a sample must not change when a dataset
is copied or moved, and must be cheap to compute, as it is compared for every record found on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from ...data import ConceptPhotos, ConceptSample, ConceptShapes, FileBenchmark, UnreadableSampleError
from ...data.files import FileItem
from ...data.ground_truths import GroundTruth
from ...data.usable import has_usable_references, with_usable_references
from ..metrics import get_protocol

# Image files of the same size and format may have the same length; the last bytes of PNG and JPEG files differ.
_TAIL = 4096


def read_sample(
    samples: Sequence[ConceptSample], index: int, protocol: str = "standard"
) -> ConceptSample | UnreadableSampleError:
    """Return a sample, or the error if it cannot be read.

    Args:
        samples: The samples.
        index: Index of the sample.
        protocol: See `protocols`. A protocol with a fixed `size` accepts ground truth masks of any shape, except in its
            `own_size` datasets.
    """
    sample = _read(samples, index)
    if isinstance(sample, UnreadableSampleError):
        settings, stretched = get_protocol(protocol), sample.stretched
        if settings.size is not None and stretched is not None and stretched.dataset not in settings.own_size:
            return stretched
        return sample
    return sample if has_usable_references(samples) else with_usable_references(sample)


def sample_to_show(samples: Sequence[ConceptSample], index: int) -> ConceptSample | UnreadableSampleError:
    """Return a sample for display, its mask stretched to the image if necessary, or the error if it is unreadable."""
    sample = _read(samples, index)
    return sample.stretched or sample if isinstance(sample, UnreadableSampleError) else sample


def _read(
    samples: Sequence[ConceptSample] | Dataset[ConceptSample], index: int
) -> ConceptSample | UnreadableSampleError:
    try:
        return samples[index]
    except UnreadableSampleError as error:
        return error
    except (OSError, ValueError) as error:  # raised by a user's own dataset
        return UnreadableSampleError(f"sample {index}: {error}", {"sample_id": str(index)})


def describe_samples(samples: Sequence[ConceptSample]) -> dict[str, Any]:
    """Return the origin of samples: the fields of the benchmark, or those of the first sample."""
    if isinstance(samples, (ConceptPhotos, ConceptShapes, FileBenchmark)):
        description = {"benchmark": samples.name, "split": samples.split, "seed": samples.seed}
        if isinstance(samples, ConceptShapes) and not samples.is_whole:
            description["groups"] = list(samples.groups)
        if isinstance(samples, FileBenchmark) and samples.loader != "default":
            description["loader"] = samples.loader
        return description
    first = _read(samples, 0)
    fields = first.fields if isinstance(first, UnreadableSampleError) else vars(first)
    return {"benchmark": fields.get("dataset", ""), "split": fields.get("split", "")}


def identify_sample(samples: Sequence[ConceptSample] | Dataset[ConceptSample], index: int) -> dict[str, Any]:
    """Return the fields of a sample's record that are known before it is segmented.

    Args:
        samples: The samples.
        index: Index of the sample.

    Returns:
        Fields by name: a hash of the files (`files`) for samples from files, and the sample's own fields for samples in
        memory. Other sequences of samples have to be read, so there are only fields for the first sample.
    """
    first = index == 0
    while isinstance(samples, Subset):
        index, samples = samples.indices[index], samples.dataset
    if isinstance(samples, FileBenchmark):
        return _identify_item(samples.items[index], samples.root)
    if not first and not isinstance(samples, (list, tuple)):
        return {}
    sample = _read(samples, index)
    if isinstance(sample, UnreadableSampleError):
        return {}
    box = None if sample.box is None else list(sample.box)
    return {"sample_id": sample.sample_id, "prompt": sample.prompt, "gt_box": box}


def _identify_item(item: FileItem, root: Path) -> dict[str, Any]:
    prompt = {"prompt": item.prompt} if item.prompt else {}  # otherwise the prompt is in a file
    description = repr(list(_describe_item(item, root))).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(description, digest_size=16).hexdigest()
    return {"sample_id": item.sample_id, **prompt, "files": digest}


def _describe_item(item: FileItem, root: Path) -> Iterator[Any]:
    for name in ("sample_id", "prompt", "level", "group", "family", "think", "rule", "answer"):
        yield getattr(item, name)
    pairs = [
        (item.image, item.ground_truth),
        *((reference.image, reference.ground_truth) for reference in item.references),
    ]
    for image, ground_truth in pairs:
        yield _describe_file(image, root)
        if ground_truth is not None:
            yield [_describe_file(path, root) for path in ground_truth.files]
            yield _describe_values(ground_truth)


def _describe_file(path: Path, root: Path) -> tuple[Any, ...]:
    """Return the name, length and last bytes of a file; only the name if it cannot be read."""
    name = Path(os.path.relpath(path, root)).as_posix()
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _TAIL))
            return name, length, file.read()
    except (OSError, ValueError):
        return (name,)


def _describe_values(ground_truth: GroundTruth) -> list[Any]:
    """Return the values of a ground truth other than its files: a label, a box, a row."""
    return [value for value in vars(ground_truth).values() if isinstance(value, (int, float, str, tuple))]
