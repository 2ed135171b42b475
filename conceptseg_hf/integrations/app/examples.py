"""Examples of the page: ConceptShapes samples with references, and photographs."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ...data import SMOKE_PHOTOS, load_benchmark
from ...images import load_image
from ...references import Reference

_SHAPES = {
    "Drawing: a shape by its looks": ("CI", 0),
    "Drawing: a shadow": ("CD", 0),
    "Drawing: the rule that references share": ("CR", 0),
    "Drawing: another rule": ("CR", 1),
}
_PHOTOS = {"Photograph: the salient object": "salient-astronaut", "Photograph: the coffee cup": "cup"}
EXAMPLE_NAMES = (*_SHAPES, *_PHOTOS)


@dataclass(frozen=True)
class Example:
    """An image with its prompt and references."""

    image: Image.Image
    prompt: str
    references: tuple[Reference, ...]


def load_example(name: str) -> Example:
    """Return an example by its name, one of `EXAMPLE_NAMES`.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in _SHAPES:
        level, number = _SHAPES[name]
        samples = (
            sample for sample in load_benchmark("concept-shapes", split="test") if sample.level == level
        )
        sample = [next(samples) for _ in range(number + 1)][-1]
    elif name in _PHOTOS:
        photos = load_benchmark("plain", root=SMOKE_PHOTOS, split="test")
        sample = next(sample for sample in photos if sample.sample_id == _PHOTOS[name])
    else:
        raise ValueError(f"there is no example {name!r}; use one of {', '.join(map(repr, EXAMPLE_NAMES))}.")
    return Example(load_image(sample.image), sample.prompt, tuple(sample.references))
