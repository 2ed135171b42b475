"""Which one: objects that a noun does not distinguish. The answer is a class noun, as VLMs give it for photographs.

There are two strata. Siblings with a shared noun differ in attributes that the noun does not contain. Siblings with an
identical look ("twins") differ only in their position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...sample import Candidate
from ..rendering import COLORS, SHAPES, TEXTURES, FloatArray, draw_background, to_uint8, turns_of
from ..scenes import (
    HELD_OUT_PAIRS,
    Box,
    Look,
    Scene,
    SceneObject,
    draw_object,
    draw_scene,
    make_objects,
    pick,
    place,
    random_look,
    random_radius,
)
from .task import Rng, Task, draw_references, other_word, shows

SAME_OBJECT = "find the same object as the marked one"


# Siblings with a shared noun


def marked_kin(rng: Rng, size: int, held_out: bool) -> Task:
    """The references mark one object; the target shows it among other objects of its shape."""
    look = random_look(rng, held_out)
    kin = _kin(rng, look, int(rng.integers(2, 4)))
    scene = draw_scene(rng, size, make_objects(rng, size, [look, *kin]))

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        others = _kin(rng, look, int(rng.integers(0, 3)))
        return shows(draw_scene(rng, size, make_objects(rng, size, [look, *others])))

    return Task(
        scene,
        scene.objects[0].mask,
        SAME_OBJECT,
        draw_references(rng, size, reference),
        f"the marked object is the {look.phrase} so it is the {look.shape}",
        f"the {look.phrase}",
        look.shape,
        candidates=_candidates(scene, 0, range(1, len(scene.objects))),
    )


def named_kin(rng: Rng, size: int, held_out: bool) -> Task:
    """The prompt names the color or texture of one of several objects of one shape."""
    by_color = bool(rng.random() < 0.6)
    look = random_look(rng, held_out, **({} if by_color else {"texture": pick(rng, TEXTURES[1:])}))
    word = look.color if by_color else look.texture
    kin: list[Look] = []
    while len(kin) < 2 + int(look.texture != "plain"):
        other = _kin(rng, look, 1)[0]
        if word not in (other.color, other.texture):
            kin.append(other)
    scene = draw_scene(rng, size, make_objects(rng, size, [look, *kin]))
    return _first_object_task(
        scene,
        f"find the object that is {word}",
        f"the {word} object is the {look.shape}",
        f"the {word} object",
        len(scene.objects),
    )


def extreme_kin(rng: Rng, size: int, held_out: bool) -> Task:
    """The largest or the smallest of several objects of one shape."""
    largest = bool(rng.random() < 0.5)
    look = random_look(rng, held_out)
    looks = [look, *_kin(rng, look, int(rng.integers(2, 4)))]
    low, high = ((0.19, 0.23), (0.09, 0.13)) if largest else ((0.07, 0.09), (0.14, 0.18))
    scene = draw_scene(rng, size, _with_first_radius(rng, size, looks, low, high))
    word = "largest" if largest else "smallest"
    return _first_object_task(
        scene,
        f"find the {word} object in the image",
        f"the {word} object is the {look.shape}",
        f"the {word} object",
        len(scene.objects),
    )


def new_kin(rng: Rng, size: int, held_out: bool) -> Task:
    """The same scene twice; the second one contains a new object among others of its shape."""
    look = random_look(rng, held_out)
    objects = make_objects(rng, size, [look, *_kin(rng, look, int(rng.integers(2, 4)))])
    background = draw_background(rng, size)
    seed = int(rng.integers(2**31))
    before = draw_scene(np.random.default_rng(seed), size, objects[1:], background)
    scene = draw_scene(np.random.default_rng(seed), size, [*objects[1:], objects[0]], background)
    last = len(objects) - 1
    return Task(
        scene,
        scene.objects[last].mask,
        "find the object that is new in this image",
        ((before, None),),
        f"the first image has one {look.shape} less and new here is the {look.shape}",
        "the object that was not there before",
        look.shape,
        candidates=_candidates(scene, last, range(last)),
    )


# Siblings with an identical look

SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
ORDINALS = ("first", "second", "third")


def beside(rng: Rng, size: int, held_out: bool) -> Task:
    """The object on a given side of another one; its twins are on other sides."""
    names = list(SIDES)
    sides = [names[i] for i in rng.permutation(4)[: int(rng.integers(2, 4))]]
    look = random_look(rng, held_out)
    anchor_look = _unlike(rng, look)
    middle = [size * (0.5 + 0.08 * (2 * float(rng.random()) - 1)) for _ in range(2)]
    radius = random_radius(rng, size, 0.09, 0.13)
    centers = []
    for side in sides:
        jitter = 0.05 * size * (2 * rng.random(2) - 1)
        dx, dy = SIDES[side]
        centers.append((middle[0] + 0.3 * size * dx + jitter[0], middle[1] + 0.3 * size * dy + jitter[1]))
    anchor = SceneObject(anchor_look, middle[0], middle[1], random_radius(rng, size, 0.09, 0.13))
    scene = draw_twins(rng, size, _twins(rng, look, radius, centers), [anchor])
    side = f"{sides[0]} of" if sides[0] in ("left", "right") else sides[0]
    return _place_task(scene, f"the object {side} the {_name(anchor_look)}", len(sides))


def ordinal(rng: Rng, size: int, held_out: bool) -> Task:
    """The first, second or third object of a row of twins, counted from one end."""
    look = random_look(rng, held_out)
    count = int(rng.integers(3, 5))
    rank = int(rng.integers(min(3, count)))
    end = ("left", "right", "top", "bottom")[int(rng.integers(4))]
    radius = random_radius(rng, size, 0.075, 0.105)
    across = 0.5 + 0.2 * (2 * float(rng.random()) - 1)
    centers = []
    for i in range(count):
        jitter = 2 * rng.random(2) - 1
        along = (i + 0.5) / count + 0.03 * jitter[0] if count == 4 else 0.2 + 0.3 * i + 0.05 * jitter[0]
        point = (along * size, (across + 0.08 * jitter[1]) * size)
        centers.append(point if end in ("left", "right") else point[::-1])
    place_of = rank if end in ("left", "top") else count - 1 - rank
    centers = [centers[place_of], *(c for i, c in enumerate(centers) if i != place_of)]
    scene = draw_twins(rng, size, _twins(rng, look, radius, centers))
    return _place_task(scene, f"the {ORDINALS[rank]} object from the {end}", count)


def distance(rng: Rng, size: int, held_out: bool) -> Task:
    """The one of several twins that is nearest to another object, or farthest from it."""
    nearest = bool(rng.random() < 0.5)
    look = random_look(rng, held_out)
    anchor_look = _unlike(rng, look)
    radius = random_radius(rng, size, 0.08, 0.12)
    anchor_radius = random_radius(rng, size, 0.08, 0.12)
    count = int(rng.integers(2, 4))
    while True:
        anchor, *twins = place(rng, size, [anchor_radius, *[radius] * count])
        twins.sort(key=lambda c: (c[0] - anchor[0]) ** 2 + (c[1] - anchor[1]) ** 2)
        far = [((x - anchor[0]) ** 2 + (y - anchor[1]) ** 2) ** 0.5 for x, y in twins]
        if not nearest:
            twins, far = twins[::-1], far[::-1]
        ratio = far[0] / far[1]
        if ratio < 0.75 or ratio > 1.33:
            break
    scene = draw_twins(
        rng, size, _twins(rng, look, radius, twins), [SceneObject(anchor_look, *anchor, anchor_radius)]
    )
    words = "nearest to" if nearest else "farthest from"
    return _place_task(scene, f"the object {words} the {_name(anchor_look)}", count)


def tracked_twin(rng: Rng, size: int, held_out: bool) -> Task:
    """One of several twins is marked in the first frame and all move slightly; find it in the last frame."""
    look = random_look(rng, held_out)
    count = int(rng.integers(2, 4))
    radius = random_radius(rng, size, 0.09, 0.13)
    while True:
        centers = place(rng, size, [radius] * count)
        gap = min(
            ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5
            for i, a in enumerate(centers)
            for b in centers[:i]
        )
        if gap > 0.3 * size:
            break
    low, high = radius * 0.95, size - radius * 0.95
    moved = []
    for center in centers:
        step = 0.3 * gap * (2 * rng.random(2) - 1)
        moved.append(tuple(float(min(max(c + s, low), high)) for c, s in zip(center, step, strict=True)))
    background = draw_background(rng, size)
    seed = int(rng.integers(2**31))
    before = _twins(rng, look, radius, centers)
    after = [replace(item, cx=x, cy=y) for item, (x, y) in zip(before, moved, strict=True)]
    first = draw_twins(np.random.default_rng(seed), size, before, background=background)
    scene = draw_twins(np.random.default_rng(seed), size, after, background=background)
    return Task(
        scene,
        scene.objects[0].mask,
        "find the marked object in the last frame",
        (shows(first),),
        f"the marked object is the {look.phrase} so it is the {look.shape}",
        "the marked object",
        look.shape,
        candidates=_candidates(scene, 0, range(1, count)),
    )


def inside_ring(rng: Rng, size: int, held_out: bool) -> Task:
    """The one of several twins that is inside a ring, or the one that is outside of it."""
    look = random_look(rng, held_out, shape=pick(rng, [s for s in SHAPES if s != "ring"]))
    ring_radius = random_radius(rng, size, 0.27, 0.31)
    colors = [c for c in COLORS if c != look.color and (c, "ring") not in HELD_OUT_PAIRS]
    ring_look = Look("ring", pick(rng, colors))
    radius = random_radius(rng, size, 0.075, 0.095)
    is_inside = bool(rng.random() < 0.5)
    ring = SceneObject(ring_look, *place(rng, size, [ring_radius])[0], ring_radius)
    jitter = 0.02 * size * (2 * rng.random(2) - 1)
    within = (ring.cx + float(jitter[0]), ring.cy + float(jitter[1]))
    outside = place(rng, size, [radius] * (1 + int(is_inside and rng.random() < 0.5)), [ring])
    centers = [within, *outside] if is_inside else [*outside, within]
    scene = draw_twins(rng, size, _twins(rng, look, radius, centers), [ring], under=True)
    word = "inside" if is_inside else "outside"
    return _place_task(scene, f"find the object {word} the {_name(ring_look)}", len(centers))


def _place_task(scene: Scene, phrase: str, twins: int) -> Task:
    """Create a task without references; the first objects are the twins, and the first twin is the target."""
    answer = scene.objects[0].look.shape
    rule = phrase.removeprefix("find ")
    return _first_object_task(scene, phrase, f"{rule} there is the {answer}", rule, twins)


def _first_object_task(scene: Scene, prompt: str, think: str, rule: str, siblings: int) -> Task:
    """Create a task without references: the target and its siblings are the first objects; the others are anchors."""
    return Task(
        scene,
        scene.objects[0].mask,
        prompt,
        (),
        think,
        rule,
        scene.objects[0].look.shape,
        candidates=_candidates(scene, 0, range(1, siblings), range(siblings, len(scene.objects))),
    )


def _candidates(
    scene: Scene, target: int, siblings: Sequence[int], anchors: Sequence[int] = ()
) -> tuple[Candidate, ...]:
    roles = [("target", target), *(("sibling", i) for i in siblings), *(("anchor", i) for i in anchors)]
    return tuple(Candidate(role, scene.objects[i].mask) for role, i in roles)


def _kin(rng: Rng, look: Look, count: int) -> list[Look]:
    """Draw different looks of the same shape."""
    kin: list[Look] = []
    colors = [c for c in COLORS if (c, look.shape) not in HELD_OUT_PAIRS]
    while len(kin) < count:
        other = random_look(rng, shape=look.shape, color=pick(rng, colors))
        if other.color != look.color or other.texture != look.texture:
            kin.append(other)
    return kin


def _unlike(rng: Rng, look: Look) -> Look:
    """Draw a plain look of another shape and color."""
    shape = other_word(rng, SHAPES, look.shape)
    colors = [c for c in COLORS if c != look.color and (c, shape) not in HELD_OUT_PAIRS]
    return Look(shape, pick(rng, colors))


def _name(look: Look) -> str:
    return f"{look.color} {look.shape}"


def _twins(rng: Rng, look: Look, radius: float, centers: Sequence[tuple[float, float]]) -> list[SceneObject]:
    turns = turns_of(look.shape)
    turn = turns[int(rng.integers(len(turns)))]
    return [SceneObject(look, float(x), float(y), radius, turn) for x, y in centers]


def _with_first_radius(
    rng: Rng, size: int, looks: Sequence[Look], first: tuple[float, float], others: tuple[float, float]
) -> list[SceneObject]:
    """Create objects with a separate range of radii for the first one."""
    objects = make_objects(rng, size, looks, *others)
    radius = random_radius(rng, size, *first)
    target = replace(objects[0], radius=radius)
    (x, y), *_ = place(rng, size, [radius])
    target = replace(target, cx=x, cy=y)
    centers = place(rng, size, [item.radius for item in objects[1:]], [target])
    rest = [replace(item, cx=x, cy=y) for item, (x, y) in zip(objects[1:], centers, strict=True)]
    return [target, *rest]


def draw_twins(
    rng: Rng,
    size: int,
    twins: Sequence[SceneObject],
    others: Sequence[SceneObject] = (),
    background: FloatArray | None = None,
    under: bool = False,
) -> Scene:
    """Draw twins in exactly the same colors; the scene lists them first.

    Args:
        rng: Random generator.
        size: Side length of the image in pixels.
        twins: Objects of identical look.
        others: Other objects.
        background: (S, S, 3); a random one by default.
        under: Whether the other objects are drawn first, below the twins.
    """
    image = draw_background(rng, size) if background is None else background.copy()
    seeds = {False: int(rng.integers(2**31)), True: int(rng.integers(2**31))}
    order = [(item, True) for item in twins]
    rest = [(item, False) for item in others]
    order = [*rest, *order] if under else [*order, *rest]
    drawn: list[SceneObject] = []
    for number, (item, is_twin) in enumerate(order):
        object_rng = np.random.default_rng([seeds[is_twin], 0 if is_twin else number])
        drawn.append(draw_object(object_rng, image, item, drawn))
    objects = [*drawn[len(others) :], *drawn[: len(others)]] if under else drawn
    return Scene(to_uint8(image), tuple(objects))
