"""Hidden rules, in the manner of Bongard problems: the references mark what obeys a rule that nobody states.

A rule has attributes ("striped", "star"), a selector ("largest", "leftmost"), or both. In every scene exactly one
object obeys the rule and others obey a part of it. Some combinations of attribute and selector are drawn in the split
"test-rules" alone.
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

# Square root of a shape's area over its radius: sizes are compared by area.
_EXTENT = {
    "circle": 1.59, "square": 1.56, "triangle": 1.13, "diamond": 1.15,
    "star": 1.23, "cross": 1.42, "ring": 1.48, "bar": 1.16,
}  # fmt: skip


def _extent(item: SceneObject, size: int) -> float:
    return item.radius * _EXTENT[item.look.shape] / size


# What each selector makes greatest, in fractions of the image's side, and by how much it must lead.
SELECTORS: dict[str, tuple[Callable[[SceneObject, int], float], float]] = {
    "largest": (_extent, 0.05),
    "smallest": (lambda item, size: -_extent(item, size), 0.04),
    "leftmost": (lambda item, size: -item.cx / size, 0.1),
    "rightmost": (lambda item, size: item.cx / size, 0.1),
    "highest": (lambda item, size: -item.cy / size, 0.1),
    "lowest": (lambda item, size: item.cy / size, 0.1),
}
ALONE = "only"  # counted, not measured: the one object whose color no other has
KINDS = ("color", "shape", "texture")


@dataclass(frozen=True)
class Rule:
    """A rule of the grammar.

    Attributes:
        attributes: Pairs of kind and word, at most two of different kinds.
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
        """Whether only the split "test-rules" draws it: every third pair of selector and kind of attribute."""
        if self.selector not in SELECTORS or not self.attributes:
            return False
        return (list(SELECTORS).index(self.selector) + KINDS.index(self.attributes[0][0])) % 3 == 0


def random_rule(rng: Rng, new: bool = False) -> Rule:
    """A rule of the training grammar, or one that is held out from it (`new`)."""
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
    """The references mark what obeys a rule; find what obeys it here."""
    rule = random_rule(rng, new)
    scene, roles = rule_scene(rng, size, rule, held_out)
    return _rule_task(rng, size, scene, roles, rule)


def coexistence(rng: Rng, size: int, held_out: bool, variant: int = 0) -> Task:
    """One target and one prompt: other references ask for another object of one look (paper, Figure 5).

    Args:
        rng: Source of chance; equal for both variants of a target.
        size: Side of the target in pixels.
        held_out: See `random_look`.
        variant: Which of the target's two rules the references show.
    """
    while True:
        first, second = (list(SELECTORS)[i] for i in rng.permutation(len(SELECTORS))[:2])
        objects = _spread(rng, size, [random_look(rng, held_out)] * int(rng.integers(2, 5)))
        found = (_leader(objects, name, size) for name in (first, second))
        leaders = [leader for leader in found if leader is not None]
        if len(set(leaders)) == 2:
            break
    target, other = leaders[variant], leaders[1 - variant]
    order = [target, *(i for i in range(len(objects)) if i != target)]
    drawn = draw_twins(rng, size, objects)
    scene = Scene(drawn.pixels, tuple(drawn.objects[i] for i in order))
    roles = ["target" if i == target else "other reading" if i == other else "sibling" for i in order]
    selector, unmeant = ((first, second), (second, first))[variant]
    return _rule_task(rng, size, scene, roles, Rule(selector=selector), unmeant)


def _rule_task(
    rng: Rng, size: int, scene: Scene, roles: list[str], rule: Rule, unmeant: str | None = None
) -> Task:
    """A task whose references obey a rule; with the selector `unmeant`, all are twins and it picks another one."""

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        while True:
            shown, _ = rule_scene(rng, size, rule, twins=unmeant is not None)
            if unmeant is None or _leader(shown.objects, unmeant, size) not in (0, None):
                return shown, shown.objects[0].box

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
    """A scene in which exactly one object obeys a rule; it comes first among the objects.

    Args:
        rng: Source of chance.
        size: Side of the picture in pixels.
        rule: The rule.
        held_out: Whether the object that obeys has a held-out pair of color and shape (where the rule allows it).
        twins: All objects have one look; for rules without attributes.

    Returns:
        The scene, and the role of each object: "target", and of the others which part of the rule they obey.
    """
    while True:
        looks = _looks(rng, rule, held_out, twins)
        objects = _spread(rng, size, looks)
        order = _ordered(objects, rule, size)
        if order is not None:
            break
    objects = [objects[i] for i, _ in order]
    scene = draw_twins(rng, size, objects) if twins else draw_scene(rng, size, objects)
    return scene, [role for _, role in order]


def _looks(rng: Rng, rule: Rule, held_out: bool, twins: bool) -> list[Look]:
    """Looks of which one or more have the rule's attributes, and some have a part of them."""
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


def _without(rng: Rng, wanted: dict[str, str], unwanted: dict[str, str]) -> Look:
    """A look with some attributes and without others."""
    while True:
        look = random_look(rng, False, **wanted)
        if not any(getattr(look, kind) == word for kind, word in unwanted.items()):
            return look


def _spread(rng: Rng, size: int, looks: list[Look]) -> list[SceneObject]:
    objects = make_objects(rng, size, looks, 0.075, 0.18)
    if len({item.look for item in objects}) == 1:  # twins turn alike
        objects = [replace(item, turn=objects[0].turn) for item in objects]
    return objects


def _leader(objects: Sequence[SceneObject], selector: str, size: int) -> int | None:
    """The object that a selector picks, if it leads clearly."""
    key, lead = SELECTORS[selector]
    values = [key(item, size) for item in objects]
    ranked = sorted(range(len(objects)), key=lambda i: -values[i])
    if len(ranked) > 1 and values[ranked[0]] - values[ranked[1]] < lead:
        return None
    return ranked[0]


def _ordered(objects: list[SceneObject], rule: Rule, size: int) -> list[tuple[int, str]] | None:
    """Indices and roles of the objects, the one that obeys first; None if the scene does not suit the rule."""
    everyone = list(range(len(objects)))
    if rule.selector == ALONE:
        return [(0, "target"), *((i, "neither") for i in everyone[1:])]
    has = [i for i in everyone if all(getattr(objects[i].look, k) == w for k, w in rule.attributes)]
    if rule.selector is None:
        part = [
            i
            for i in everyone
            if i not in has and any(getattr(objects[i].look, k) == w for k, w in rule.attributes)
        ]
        roles = {i: "one attribute" if i in part else "neither" for i in everyone}
        return [(0, "target"), *((i, roles[i]) for i in everyone[1:])] if has == [0] else None
    leader = _leader([objects[i] for i in has], rule.selector, size)
    # The look that may be held out comes first: it must be the one that obeys.
    if leader is None or has[leader] != 0:
        return None
    if not rule.attributes:
        return [(0, "target"), *((i, "neither") for i in everyone[1:])]
    overall = _leader(objects, rule.selector, size)
    if overall is None or overall in has:
        return None  # somebody without the attribute must go farther
    roles = {i: "attribute only" if i in has else "neither" for i in everyone} | {overall: "selector only"}
    return [(0, "target"), *((i, roles[i]) for i in everyone[1:])]
