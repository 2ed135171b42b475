"""Samples of any origin without the references that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..references import usable_references
from .concept_shapes import ConceptShapes
from .files import FileBenchmark
from .sample import ConceptSample


def has_usable_references(samples: Sequence[ConceptSample]) -> bool:
    """Whether references are drawn, or tried when a sample is read; also of samples in wrappers of torch."""
    if hasattr(samples, "datasets"):
        return all(map(has_usable_references, samples.datasets))
    if hasattr(samples, "dataset") and hasattr(samples, "indices"):
        return has_usable_references(samples.dataset)
    return isinstance(samples, (ConceptShapes, FileBenchmark))


def with_usable_references(sample: ConceptSample) -> ConceptSample:
    """A sample without those references that cannot be read, of which it then says so; itself if all can be."""
    if not isinstance(sample, ConceptSample):
        return sample  # whoever uses it says what is wrong
    usable, faults = usable_references(sample.references)
    if not faults:
        return sample
    return replace(
        sample,
        references=usable,
        reference_faults=(*sample.reference_faults, *faults),
        references_lost=sample.references_lost + len(faults),
    )
