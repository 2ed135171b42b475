"""Benchmarks of concept segmentation: samples with image, mask, prompt, level and references."""

from .check import DataCheck, check_benchmark
from .concept_shapes import ConceptShapes
from .files import FileBenchmark
from .paths import MissingFilesError
from .registry import BENCHMARKS, get_source, load_benchmark
from .sample import ConceptSample, UnreadableSampleError
from .suite import SOURCES, SUITE, Source
from .tables import as_dataset

__all__ = [
    "BENCHMARKS",
    "SOURCES",
    "SUITE",
    "ConceptSample",
    "ConceptShapes",
    "DataCheck",
    "FileBenchmark",
    "MissingFilesError",
    "Source",
    "UnreadableSampleError",
    "as_dataset",
    "check_benchmark",
    "get_source",
    "load_benchmark",
]
