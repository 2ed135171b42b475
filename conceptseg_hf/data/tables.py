"""Conversion of samples to a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..images import load_image
from ..references import resolve_references
from .sample import ConceptSample

if TYPE_CHECKING:
    import datasets

_STRING_FIELDS = (
    "sample_id",
    "dataset",
    "split",
    "prompt",
    "level",
    "group",
    "family",
    "think",
    "rule",
    "answer",
)


def as_dataset(samples: Sequence[ConceptSample]) -> datasets.Dataset:
    """Convert samples to a `datasets.Dataset`, which is written to its cache once.

    Masks of references become boxes; references are stored as a list of images and a list of boxes. The cache
    identifies samples by their paths: after changing a file in place, clear it (`Dataset.cleanup_cache_files`).

    Args:
        samples: The result of `load_benchmark`, or any sequence of samples.

    Raises:
        ImportError: If the package datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "as_dataset needs the package datasets; install it with: pip install datasets"
        ) from error
    box = datasets.List(datasets.Value("float32"))
    features = datasets.Features(
        {name: datasets.Value("string") for name in _STRING_FIELDS}
        | {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "ignore": datasets.Image(),
            "box": box,
            "box_only": datasets.Value("bool"),
            "reference_images": datasets.List(datasets.Image()),
            "reference_boxes": datasets.List(box),
        }
    )
    return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs={"samples": samples})


def _rows(samples: Sequence[ConceptSample]) -> Iterator[dict[str, Any]]:
    for index in range(len(samples)):
        sample = samples[index]
        references = resolve_references(sample.references)
        yield {name: getattr(sample, name) for name in _STRING_FIELDS} | {
            "image": load_image(sample.image),
            "mask": sample.mask,
            "ignore": sample.ignore,
            "box": None if sample.box is None else list(sample.box),
            "box_only": sample.box_only,
            "reference_images": list(references.images),
            "reference_boxes": [None if box is None else list(box) for box in references.boxes],
        }
