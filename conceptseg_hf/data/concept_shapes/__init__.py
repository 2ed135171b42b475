"""ConceptShapes: a procedurally generated concept segmentation benchmark that needs no files."""

from .benchmark import SPLITS, ConceptShapes

__all__ = ["SPLITS", "ConceptShapes"]
