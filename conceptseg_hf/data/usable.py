"""Removal of unusable references from samples of any origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..references import usable_references
from .concept_shapes import ConceptShapes
from .files import FileBenchmark
from .sample import ConceptSample


def has_usable_references(samples: Sequence[ConceptSample]) -> bool:
    """Whether all references are usable: generated, or checked when a sample is read; torch wrappers are unwrapped."""
    if hasattr(samples, "datasets"):
        return all(map(has_usable_references, samples.datasets))
    if hasattr(samples, "dataset") and hasattr(samples, "indices"):
        return has_usable_references(samples.dataset)
    return isinstance(samples, (ConceptShapes, FileBenchmark))


def with_usable_references(sample: ConceptSample) -> ConceptSample:
    """Return the sample without unusable references, and with their faults in `reference_faults`."""
    if not isinstance(sample, ConceptSample):
        return sample  # the caller reports the wrong type
    usable, faults = usable_references(sample.references)
    if not faults:
        return sample
    return replace(
        sample,
        references=usable,
        reference_faults=(*sample.reference_faults, *faults),
        references_lost=sample.references_lost + len(faults),
    )
