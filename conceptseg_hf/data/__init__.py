"""Concept segmentation benchmarks: samples with an image, a mask, a prompt, a level and references."""

from pathlib import Path

from .check import DataCheck, check_benchmark, check_benchmarks
from .concept_photos import ConceptPhotos
from .concept_shapes import ConceptShapes
from .files import FileBenchmark
from .groups import GROUPS, BenchmarkGroup, load_benchmarks
from .paths import MissingFilesError
from .registry import BENCHMARKS, get_source, load_benchmark
from .sample import ConceptSample, UnreadableSampleError
from .suite import SOURCES, SUITE, Source
from .tables import as_dataset

SMOKE_PHOTOS = Path(__file__).parent / "smoke_photos"
"""Folder of seven public-domain photographs with masks, a benchmark `plain`; its README states their terms."""

__all__ = [
    "BENCHMARKS",
    "GROUPS",
    "SMOKE_PHOTOS",
    "SOURCES",
    "SUITE",
    "BenchmarkGroup",
    "ConceptPhotos",
    "ConceptSample",
    "ConceptShapes",
    "DataCheck",
    "FileBenchmark",
    "MissingFilesError",
    "Source",
    "UnreadableSampleError",
    "as_dataset",
    "check_benchmark",
    "check_benchmarks",
    "get_source",
    "load_benchmark",
    "load_benchmarks",
]
