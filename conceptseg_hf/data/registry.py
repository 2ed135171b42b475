"""Benchmarks by name."""

from __future__ import annotations

from collections.abc import Sequence

from .concept_shapes import ConceptShapes
from .sample import ConceptSample

BENCHMARKS = {"concept-shapes": ConceptShapes}


def load_benchmark(name: str, split: str = "test", limit: int | None = None) -> Sequence[ConceptSample]:
    """Loads a benchmark.

    Args:
        name: `"concept-shapes"`.
        split: A split of that benchmark.
        limit: Only the first samples of the split.

    Raises:
        ValueError: If no benchmark or split has that name.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"load_benchmark: no benchmark is named {name!r}; use one of {', '.join(BENCHMARKS)}."
        )
    return BENCHMARKS[name](split, length=limit)
