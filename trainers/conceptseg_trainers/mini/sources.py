"""Scenes of all three kinds, by number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from .nouns import ABSENT_FROM_COMPOSITIONS, OBJECT, PHOTO_NOUNS
from .photographs import Part, PhotographLibrary
from .scenes import Composer, Drawings, Scene, sheet
from .tokenizers import SHAPE_WORDS

_COMPOSED, _DRAWN = 0.2, 0.12  # fractions of the scenes
_TWINS = 0.4  # fraction of the composed scenes with identical objects
_ABSENT = 4  # absent nouns per scene
_NINE = 0.3  # fraction of the sheets with nine photographs instead of four


class SceneMix:
    """Training scenes: photographs, compositions and drawings.

    Args:
        root: Folder of the benchmark `photos`.
        size: Side length of all images in pixels.
        seed: Random seed.
        part: Part of the photographs.
    """

    def __init__(self, root: Path, size: int, seed: int, part: Part = "train") -> None:
        self.size, self.seed = size, seed
        self.photographs = PhotographLibrary(root, part, size)
        self.composer = Composer(root, size, absent=ABSENT_FROM_COMPOSITIONS)
        absent = tuple(noun for noun in PHOTO_NOUNS if noun not in {OBJECT, *SHAPE_WORDS})
        self.drawings = Drawings(size, absent)

    def scene(self, stream: int, number: int) -> Scene:
        """Return a scene, which depends only on the two numbers; a few of its absent nouns are kept."""
        rng = np.random.default_rng([stream, self.seed, number])
        kind = rng.random()
        if kind < _DRAWN:
            scene = self.drawings.draw(number)
        elif kind < _DRAWN + _COMPOSED:
            scene = self.composer.draw(rng, twins=rng.random() < _TWINS)
        else:
            scene = self.photographs.draw(rng)
        return _with_few_absent(rng, scene)

    def sheet(self, stream: int, number: int) -> Scene:
        """Return four or nine photographs in a grid, which depend only on the two numbers; see `scenes.sheet`."""
        rng = np.random.default_rng([stream, self.seed, number])
        count = 9 if rng.random() < _NINE else 4
        return _with_few_absent(rng, sheet(self.photographs.draw_several(rng, count), self.size))

    def matching_pair(self, rng: np.random.Generator) -> tuple[Scene, Scene, int]:
        """Return a reference, a target, and the index of the reference's first object in the target."""
        return self.composer.matching_pair(rng)


def _with_few_absent(rng: np.random.Generator, scene: Scene) -> Scene:
    count = min(_ABSENT, len(scene.absent))
    absent = [scene.absent[int(i)] for i in rng.choice(len(scene.absent), count, replace=False)]
    return replace(scene, absent=tuple(absent))
