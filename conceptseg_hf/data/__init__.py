"""Benchmarks of concept segmentation: samples with image, mask, prompt, level and references."""

from .concept_shapes import ConceptShapes
from .registry import BENCHMARKS, load_benchmark
from .sample import ConceptSample

__all__ = ["BENCHMARKS", "ConceptSample", "ConceptShapes", "load_benchmark"]
