"""The samples of an evaluation: reading one, and telling which they are without reading pictures.

Records are resumed only with the samples that they were made of. What tells samples apart must stay the same when a
data set is copied or moved, and must cost little, as every record that is found on disk is compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from ...data import ConceptSample, ConceptShapes, FileBenchmark, UnreadableSampleError
from ...data.files import FileItem
from ...data.ground_truths import GroundTruth
from ...data.usable import has_usable_references, with_usable_references
from ..metrics import get_protocol

# Pictures of one size and form may have files of equal length; the last bytes of PNG and JPEG files tell them apart.
_TAIL = 4096


def read_sample(
    samples: Sequence[ConceptSample], index: int, protocol: str = "standard"
) -> ConceptSample | UnreadableSampleError:
    """A sample, or why there is none.

    Args:
        samples: The samples.
        index: The place of one of them.
        protocol: See `protocols`; one that compares at a size of its own takes true masks of any shape, but those of
            data sets that it compares at theirs.
    """
    sample = _read(samples, index)
    if isinstance(sample, UnreadableSampleError):
        rule, stretched = get_protocol(protocol), sample.stretched
        if rule.size is not None and stretched is not None and stretched.dataset not in rule.own_size:
            return stretched
        return sample
    return sample if has_usable_references(samples) else with_usable_references(sample)


def sample_to_show(samples: Sequence[ConceptSample], index: int) -> ConceptSample | UnreadableSampleError:
    """A sample for a page: its mask stretched to the image if need be; or why it cannot be read."""
    sample = _read(samples, index)
    return sample.stretched or sample if isinstance(sample, UnreadableSampleError) else sample


def _read(
    samples: Sequence[ConceptSample] | Dataset[ConceptSample], index: int
) -> ConceptSample | UnreadableSampleError:
    try:
        return samples[index]
    except UnreadableSampleError as error:
        return error
    except (OSError, ValueError) as error:  # of samples of one's own
        return UnreadableSampleError(f"sample {index}: {error}", {"sample_id": str(index)})


def describe_samples(samples: Sequence[ConceptSample]) -> dict[str, Any]:
    """Where samples come from: what they say of themselves, or else what the first one says."""
    if isinstance(samples, (ConceptShapes, FileBenchmark)):
        described = {"benchmark": samples.name, "split": samples.split, "seed": samples.seed}
        if isinstance(samples, ConceptShapes) and not samples.is_whole:
            described["groups"] = list(samples.groups)
        if isinstance(samples, FileBenchmark) and samples.loader != "default":
            described["loader"] = samples.loader
        return described
    first = _read(samples, 0)
    fields = first.fields if isinstance(first, UnreadableSampleError) else vars(first)
    return {"benchmark": fields.get("dataset", ""), "split": fields.get("split", "")}


def identify_sample(samples: Sequence[ConceptSample] | Dataset[ConceptSample], index: int) -> dict[str, Any]:
    """Those fields of a sample's record that are known beforehand.

    Args:
        samples: The samples.
        index: The place of one of them.

    Returns:
        Fields by name: of files their hash (`files`), of samples in memory what they say; of samples that would have to
        be read, only the first says anything.
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
    words = {"prompt": item.prompt} if item.prompt else {}  # else a file has them
    described = repr(list(_describe_item(item, root))).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(described, digest_size=16).hexdigest()
    return {"sample_id": item.sample_id, **words, "files": digest}


def _describe_item(item: FileItem, root: Path) -> Iterator[Any]:
    for name in ("sample_id", "prompt", "level", "group", "family", "think", "rule", "answer"):
        yield getattr(item, name)
    pictures = [(item.image, item.ground_truth), *((own.image, own.ground_truth) for own in item.references)]
    for image, ground_truth in pictures:
        yield _describe_file(image, root)
        if ground_truth is not None:
            yield [_describe_file(path, root) for path in ground_truth.files]
            yield _describe_values(ground_truth)


def _describe_file(path: Path, root: Path) -> tuple[Any, ...]:
    """Name, length and end of a file; the name alone of one that cannot be read."""
    name = Path(os.path.relpath(path, root)).as_posix()
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _TAIL))
            return name, length, file.read()
    except (OSError, ValueError):
        return (name,)


def _describe_values(ground_truth: GroundTruth) -> list[Any]:
    """What a truth knows besides its file: a label, a box, a row."""
    return [value for value in vars(ground_truth).values() if isinstance(value, (int, float, str, tuple))]
