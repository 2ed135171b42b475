"""Referring expressions: phrases that single out one object of a scene by its size or its place.

They are the perception examples of the stage "base-referring": the VLM learns to locate what a phrase refers to, as
Qwen2.5-VL can, without being told which object a task asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from conceptseg_hf.data.concept_shapes.families.hidden_rule import KINDS, SELECTORS, Rule, leader
from conceptseg_hf.data.concept_shapes.families.which_one import SIDES
from conceptseg_hf.data.concept_shapes.scenes import SceneObject

_LEAD = 0.75  # largest ratio of the distances of the nearest object and the next one
_WEDGE = 0.5  # largest tangent of the angle between the direction to an object and its side


def referring_expressions(
    rng: np.random.Generator, objects: Sequence[SceneObject], size: int
) -> list[tuple[str, SceneObject]]:
    """Return phrases that each refer to exactly one of the objects, and this object.

    Phrases of the hidden rules that are held out from training do not occur.

    Args:
        rng: Random generator, for the attributes in phrases like "the largest striped object".
        objects: The objects of a scene.
        size: Side length of the scene in pixels.
    """
    usable = [item for item in objects if not item.look.kind and item.mask.any()]
    if len(usable) < 2:
        return []
    return [*_selected(rng, usable, size), *_related(usable, size)]


def _selected(
    rng: np.random.Generator, objects: Sequence[SceneObject], size: int
) -> Iterator[tuple[str, SceneObject]]:
    """Yield the objects that are first by a selector, among all and among those that share an attribute."""
    for selector in SELECTORS:
        if (first := leader(objects, selector, size)) is not None:
            yield Rule(selector=selector).phrase, objects[first]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        word = getattr(objects[int(rng.integers(len(objects)))].look, kind)
        rule = Rule(((kind, word),), selector)
        matching = [item for item in objects if getattr(item.look, kind) == word]
        if word == "plain" or rule.is_held_out or not 1 < len(matching) < len(objects):
            continue
        if (first := leader(matching, selector, size)) is not None:
            yield rule.phrase, matching[first]


def _related(objects: Sequence[SceneObject], size: int) -> Iterator[tuple[str, SceneObject]]:
    """Yield the objects that are nearest to a named object, farthest from it, or alone on one of its sides."""
    names = [f"{item.look.color} {item.look.shape}" for item in objects]
    for anchor, name in zip(objects, names, strict=True):
        if names.count(name) > 1 or len(objects) < 3:
            continue
        others = [item for item in objects if item is not anchor]
        ranked = sorted(others, key=lambda item: _distance(item, anchor))
        near, *_, far = ranked
        if _distance(near, anchor) < _LEAD * _distance(ranked[1], anchor):
            yield f"the object nearest to the {name}", near
        if _distance(ranked[-2], anchor) < _LEAD * _distance(far, anchor):
            yield f"the object farthest from the {name}", far
        for side, direction in SIDES.items():
            found = [item for item in others if _is_beside(item, anchor, direction, size)]
            if len(found) == 1:
                side_of = f"{side} of" if side in ("left", "right") else side
                yield f"the object {side_of} the {name}", found[0]


def _distance(item: SceneObject, other: SceneObject) -> float:
    return math.hypot(item.cx - other.cx, item.cy - other.cy)


def _is_beside(item: SceneObject, anchor: SceneObject, direction: tuple[int, int], size: int) -> bool:
    dx, dy = item.cx - anchor.cx, item.cy - anchor.cy
    along = dx * direction[0] + dy * direction[1]
    across = abs(dx * direction[1]) + abs(dy * direction[0])
    return along > 0.1 * size and across < _WEDGE * along
