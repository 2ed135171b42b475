"""ConceptShapes: a procedural benchmark of concept segmentation that needs no files."""

from .benchmark import SPLITS, ConceptShapes

__all__ = ["SPLITS", "ConceptShapes"]
