"""Hidden rules, as in Bongard problems: the references mark objects that satisfy an unstated rule.

A rule has attributes ("striped", "star"), a selector ("largest", "leftmost"), or both. In every scene exactly one
object satisfies the rule and others satisfy a part of it. Some combinations of attribute and selector are drawn only in
the split "test-rules".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...sample import Candidate
from ..rendering import COLORS, SHAPES, TEXTURES
from ..scenes import (
    HELD_OUT_PAIRS,
    Box,
    Look,
    Scene,
    SceneObject,
    draw_scene,
    make_objects,
    pick,
    random_look,
)
from .task import Rng, Task, draw_references
from .which_one import draw_twins

PROMPT = "find the object by the rule of the marked ones"

# Square root of a shape's area, divided by its radius: sizes are compared by area.
_EXTENT = {
    "circle": 1.59, "square": 1.56, "triangle": 1.13, "diamond": 1.15,
    "star": 1.23, "cross": 1.42, "ring": 1.48, "bar": 1.16,
}  # fmt: skip


def _extent(item: SceneObject, size: int) -> float:
    return item.radius * _EXTENT[item.look.shape] / size


# The value that each selector maximizes, as a fraction of the image's side length, and its minimum lead.
SELECTORS: dict[str, tuple[Callable[[SceneObject, int], float], float]] = {
    "largest": (_extent, 0.05),
    "smallest": (lambda item, size: -_extent(item, size), 0.04),
    "leftmost": (lambda item, size: -item.cx / size, 0.1),
    "rightmost": (lambda item, size: item.cx / size, 0.1),
    "highest": (lambda item, size: -item.cy / size, 0.1),
    "lowest": (lambda item, size: item.cy / size, 0.1),
}
ALONE = "only"  # not measured: the only object with a color that no other object has
KINDS = ("color", "shape", "texture")


@dataclass(frozen=True)
class Rule:
    """A rule of the grammar.

    Attributes:
        attributes: Pairs of kind and word, at most two, of different kinds.
        selector: A key of `SELECTORS`, `ALONE`, or None.
    """

    attributes: tuple[tuple[str, str], ...] = ()
    selector: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The attribute words."""
        return tuple(word for _, word in self.attributes)

    @property
    def phrase(self) -> str:
        """The rule in words, for instance "the largest striped object"."""
        if self.selector == ALONE:
            return "the only object of its color"
        fixed = dict(self.attributes)
        adjectives = [fixed[kind] for kind in ("texture", "color") if kind in fixed]
        parts = [self.selector] if self.selector else []
        return " ".join(["the", *parts, *adjectives, fixed.get("shape", "object")])

    @property
    def is_held_out(self) -> bool:
        """Whether only the split "test-rules" draws the rule: every third pair of selector and kind of attribute."""
        if self.selector not in SELECTORS or not self.attributes:
            return False
        return (list(SELECTORS).index(self.selector) + KINDS.index(self.attributes[0][0])) % 3 == 0


def random_rule(rng: Rng, new: bool = False) -> Rule:
    """Draw a rule of the training grammar, or one that is held out from it (`new`)."""
    while True:
        form = 1.0 if new else float(rng.random())
        if form < 0.1:
            return Rule(selector=ALONE)
        kinds = [KINDS[i] for i in rng.permutation(3)]
        words = {"color": list(COLORS), "shape": list(SHAPES), "texture": list(TEXTURES[1:])}
        selector = list(SELECTORS)[int(rng.integers(len(SELECTORS)))]
        attributes = tuple((kind, pick(rng, words[kind])) for kind in kinds)
        if form < 0.25:
            return Rule(attributes[:1])
        if form < 0.45:
            pair = dict(attributes[:2])
            if (pair.get("color"), pair.get("shape")) in HELD_OUT_PAIRS:
                continue
            return Rule(attributes[:2])
        if form < 0.65:
            return Rule(selector=selector)
        rule = Rule(attributes[:1], selector)
        if rule.is_held_out == new:
            return rule


def hidden_rule(rng: Rng, size: int, held_out: bool, new: bool = False) -> Task:
    """The references mark objects that satisfy a rule; find the object that satisfies it in the target."""
    rule = random_rule(rng, new)
    scene, roles = rule_scene(rng, size, rule, held_out)
    return _rule_task(rng, size, scene, roles, rule)


def coexistence(rng: Rng, size: int, held_out: bool, variant: int = 0) -> Task:
    """One target and one prompt; the references determine which of several twins is meant (paper, Figure 5).

    Args:
        rng: Random generator; identical for both variants of a target.
        size: Side length of the target in pixels.
        held_out: See `random_look`.
        variant: Index of the rule that the references show, out of the two rules of the target.
    """
    while True:
        first, second = (list(SELECTORS)[i] for i in rng.permutation(len(SELECTORS))[:2])
        objects = _spread(rng, size, [random_look(rng, held_out)] * int(rng.integers(2, 5)))
        candidates = (leader(objects, name, size) for name in (first, second))
        leaders = [index for index in candidates if index is not None]
        if len(set(leaders)) == 2:
            break
    target, other = leaders[variant], leaders[1 - variant]
    order = [target, *(i for i in range(len(objects)) if i != target)]
    drawn = draw_twins(rng, size, objects)
    scene = Scene(drawn.pixels, tuple(drawn.objects[i] for i in order))
    roles = ["target" if i == target else "other reading" if i == other else "sibling" for i in order]
    selector, other_selector = ((first, second), (second, first))[variant]
    return _rule_task(rng, size, scene, roles, Rule(selector=selector), other_selector)


def _rule_task(
    rng: Rng, size: int, scene: Scene, roles: list[str], rule: Rule, other_selector: str | None = None
) -> Task:
    """Create a task for a rule; if `other_selector` is given, all objects are twins and it picks a different one."""

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        while True:
            reference_scene, _ = rule_scene(rng, size, rule, twins=other_selector is not None)
            if other_selector is None or leader(reference_scene.objects, other_selector, size) not in (
                0,
                None,
            ):
                return reference_scene, reference_scene.objects[0].box

    answer = scene.objects[0].look.shape
    return Task(
        scene,
        scene.objects[0].mask,
        PROMPT,
        draw_references(rng, size, reference, int(rng.choice([3, 4, 4, 4]))),
        f"the marked objects are each {rule.phrase} and here it is the {answer}",
        rule.phrase,
        answer,
        candidates=tuple(Candidate(role, item.mask) for role, item in zip(roles, scene.objects, strict=True)),
    )


def rule_scene(
    rng: Rng, size: int, rule: Rule, held_out: bool = False, twins: bool = False
) -> tuple[Scene, list[str]]:
    """Draw a scene in which exactly one object satisfies a rule; that object is the first one.

    Args:
        rng: Random generator.
        size: Side length of the image in pixels.
        rule: The rule.
        held_out: Whether the object that satisfies the rule has a held-out pair of color and shape (if the rule allows
            it).
        twins: Whether all objects have the same look; for rules without attributes.

    Returns:
        The scene, and the role of each object: "target", or the part of the rule that the object satisfies.
    """
    while True:
        looks = _looks(rng, rule, held_out, twins)
        objects = _spread(rng, size, looks)
        order = _order_objects(objects, rule, size)
        if order is not None:
            break
    objects = [objects[i] for i, _ in order]
    scene = draw_twins(rng, size, objects) if twins else draw_scene(rng, size, objects)
    return scene, [role for _, role in order]


def _looks(rng: Rng, rule: Rule, held_out: bool, twins: bool) -> list[Look]:
    """Draw looks; at least the first one has the rule's attributes, and some have a part of them."""
    fixed = dict(rule.attributes)
    if rule.selector == ALONE:
        target = random_look(rng, held_out)
        rest = [c for c in COLORS if c != target.color]
        colors = [rest[i] for i in rng.permutation(len(rest))[: int(rng.integers(1, 3))]]
        return [target, *(random_look(rng, color=color) for color in colors for _ in range(2))]
    if twins:
        return [random_look(rng)] * int(rng.integers(3, 5))
    free = "color" not in fixed or "shape" not in fixed
    target = random_look(rng, held_out and free, **fixed)
    if rule.selector is None:
        partial = [
            _without(rng, {kind: word}, {k: w for k, w in fixed.items() if k != kind})
            for kind, word in (fixed.items() if len(fixed) > 1 else ())
        ]
        others = [_without(rng, {}, fixed) for _ in range(int(rng.integers(1, 3)))]
        return [target, *partial, *others]
    if not fixed:
        return [target, *(random_look(rng) for _ in range(int(rng.integers(2, 4))))]
    holders = [random_look(rng, False, **fixed) for _ in range(int(rng.integers(1, 3)))]
    others = [_without(rng, {}, fixed) for _ in range(int(rng.integers(1, 3)))]
    return [target, *holders, *others]


def _without(rng: Rng, required: dict[str, str], excluded: dict[str, str]) -> Look:
    """Draw a look with the required attributes and without the excluded ones."""
    while True:
        look = random_look(rng, False, **required)
        if not any(getattr(look, kind) == word for kind, word in excluded.items()):
            return look


def _spread(rng: Rng, size: int, looks: list[Look]) -> list[SceneObject]:
    objects = make_objects(rng, size, looks, 0.075, 0.18)
    if len({item.look for item in objects}) == 1:  # twins have the same rotation
        objects = [replace(item, turn=objects[0].turn) for item in objects]
    return objects


def leader(objects: Sequence[SceneObject], selector: str, size: int) -> int | None:
    """Return the index of the object that a selector picks; None if its lead is too small."""
    key, lead = SELECTORS[selector]
    values = [key(item, size) for item in objects]
    ranked = sorted(range(len(objects)), key=lambda i: -values[i])
    if len(ranked) > 1 and values[ranked[0]] - values[ranked[1]] < lead:
        return None
    return ranked[0]


def _order_objects(objects: list[SceneObject], rule: Rule, size: int) -> list[tuple[int, str]] | None:
    """Return indices and roles of the objects, with the target first; None if the scene does not fit the rule."""
    indices = list(range(len(objects)))
    if rule.selector == ALONE:
        return [(0, "target"), *((i, "neither") for i in indices[1:])]
    matching = [i for i in indices if all(getattr(objects[i].look, k) == w for k, w in rule.attributes)]
    if rule.selector is None:
        part = [
            i
            for i in indices
            if i not in matching and any(getattr(objects[i].look, k) == w for k, w in rule.attributes)
        ]
        roles = {i: "one attribute" if i in part else "neither" for i in indices}
        return [(0, "target"), *((i, roles[i]) for i in indices[1:])] if matching == [0] else None
    first = leader([objects[i] for i in matching], rule.selector, size)
    # The first look may be held out, so it must be the one that satisfies the rule.
    if first is None or matching[first] != 0:
        return None
    if not rule.attributes:
        return [(0, "target"), *((i, "neither") for i in indices[1:])]
    overall = leader(objects, rule.selector, size)
    if overall is None or overall in matching:
        return None  # an object without the attribute must have a larger value
    roles = {i: "attribute only" if i in matching else "neither" for i in indices} | {
        overall: "selector only"
    }
    return [(0, "target"), *((i, roles[i]) for i in indices[1:])]
