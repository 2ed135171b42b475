"""ConceptPhotos: scenes composed of photographs, for concepts that depend on several objects or images."""

from .benchmark import ConceptPhotos

__all__ = ["ConceptPhotos"]
