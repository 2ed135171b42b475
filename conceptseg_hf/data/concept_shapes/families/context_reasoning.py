"""CR: the target follows from comparing objects or images. Consistency to spatio-temporality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..rendering import COLORS, SHAPES, FloatArray, draw_background
from ..scenes import (
    HELD_OUT_PAIRS,
    Box,
    Look,
    Scene,
    SceneObject,
    draw_scene,
    make_objects,
    pick,
    place,
    random_look,
    random_radius,
)
from .task import Rng, Task, distractors, draw_references, look_with, other_word, shows

# CR: consistency


def common_attribute(rng: Rng, size: int, held_out: bool) -> Task:
    """The marked objects share only a color or a shape; find the object that also has it."""
    look = random_look(rng, held_out)
    word = look.color if rng.random() < 0.5 else look.shape
    scene = draw_scene(
        rng, size, make_objects(rng, size, [look, *distractors(rng, int(rng.integers(1, 4)), [word])])
    )

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        objects = make_objects(
            rng, size, [look_with(rng, [word], False), *distractors(rng, int(rng.integers(0, 3)), [word])]
        )
        return shows(draw_scene(rng, size, objects))

    prompt = "the object with what the marked objects share"
    thing = f"{word} object" if word in COLORS else word
    references = draw_references(rng, size, reference, int(rng.choice([2, 3, 4, 4, 4])))
    think = f"the marked objects are each a {thing} and here it is the {look.phrase}"
    return Task(scene, scene.objects[0].mask, prompt, references, think, f"find the {thing}", look.phrase)


def same_object(rng: Rng, size: int, held_out: bool) -> Task:
    """The references mark the same object in different positions; find it among similar objects."""
    look = random_look(rng, held_out)
    twins = [
        replace(
            look,
            color=pick(rng, [c for c in COLORS if c != look.color and (c, look.shape) not in HELD_OUT_PAIRS]),
        ),
        replace(
            look,
            shape=pick(rng, [s for s in SHAPES if s != look.shape and (look.color, s) not in HELD_OUT_PAIRS]),
        ),
    ]

    def draw(rng: Rng, size: int, count: int) -> Scene:
        extra = distractors(rng, count, [look.color, look.shape])
        return draw_scene(rng, size, make_objects(rng, size, [look, *extra]))

    scene = draw_scene(
        rng, size, make_objects(rng, size, [look, *twins, *distractors(rng, 1, [look.color, look.shape])])
    )
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size, int(rng.integers(0, 3)))))
    think = f"the marked object is the {look.phrase}"
    return Task(
        scene,
        scene.objects[0].mask,
        "find the same object as the marked one",
        references,
        think,
        f"the {look.phrase}",
        look.phrase,
    )


def same_part(rng: Rng, size: int, held_out: bool) -> Task:
    """Objects have a core of a different color; the references mark the core of one kind of object."""
    shape = pick(rng, ("circle", "square", "triangle", "diamond"))

    def draw(rng: Rng, size: int) -> Scene:
        shapes = [
            shape,
            *(
                pick(rng, [s for s in ("circle", "square", "triangle", "diamond") if s != shape])
                for _ in range(int(rng.integers(1, 3)))
            ),
        ]
        bodies = make_objects(
            rng, size, [random_look(rng, shape=s, texture="plain") for s in shapes], 0.16, 0.22
        )
        objects: list[SceneObject] = []
        for body in bodies:
            core = Look("circle", other_word(rng, COLORS, body.look.color), kind="core")
            objects += [body, SceneObject(core, body.cx, body.cy, body.radius * 0.46)]
        return draw_scene(rng, size, objects)

    scene = draw(rng, size)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size), 1))
    answer = scene.objects[1].look.phrase
    think = f"the marked part is the core of the {shape} and here it is the {answer}"
    return Task(
        scene,
        scene.objects[1].mask,
        "find the same part of the object",
        references,
        think,
        f"the core of the {shape}",
        answer,
    )


# CR: difference


def changed(rng: Rng, size: int, held_out: bool) -> Task:
    """The same scene twice; the second one contains a new object."""
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(1, 4))))]
    objects = make_objects(rng, size, looks)
    background = draw_background(rng, size)
    seed = int(rng.integers(2**31))
    # Both scenes use the same seed and draw the old objects first, so that these look the same.
    before = draw_scene(np.random.default_rng(seed), size, objects[1:], background)
    scene = draw_scene(np.random.default_rng(seed), size, [*objects[1:], objects[0]], background)
    answer = looks[0].phrase
    think = f"the first image has no {answer}"
    rule = "the object that was not there before"
    return Task(
        scene,
        scene.objects[-1].mask,
        "find the object that is new in this image",
        ((before, None),),
        think,
        rule,
        answer,
    )


def differs(rng: Rng, size: int, held_out: bool) -> Task:
    """The references mark one kind of object; the target contains several of that kind and one of another kind."""
    look = random_look(rng)
    odd = random_look(rng, held_out, shape=other_word(rng, SHAPES, look.shape))

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        return shows(draw_scene(rng, size, make_objects(rng, size, [look] * int(rng.integers(1, 4)))))

    scene = draw_scene(rng, size, make_objects(rng, size, [odd, *[look] * int(rng.integers(2, 4))]))
    think = f"the marked objects are each a {look.shape} unlike the {odd.phrase}"
    prompt = "find the object that differs from the marked ones"
    # The rule names the marked kind of object, so that the proxy query verifies what the target differs from.
    return Task(
        scene,
        scene.objects[0].mask,
        prompt,
        draw_references(rng, size, reference),
        think,
        f"not a {look.shape}",
        odd.phrase,
    )


# CR: rationality

RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


def relation(rng: Rng, size: int, held_out: bool) -> Task:
    """The object on a given side of another one."""
    names = list(RELATIONS)
    name = names[int(rng.integers(4))]
    anchor_look = random_look(rng, texture="plain")
    looks = [random_look(rng, held_out), random_look(rng)]
    radii = [random_radius(rng, size, 0.09, 0.14) for _ in range(3)]
    reach = 0.3 * size
    dx, dy = RELATIONS[name]
    cx, cy = (size * (0.5 + 0.08 * (2 * float(rng.random()) - 1)) for _ in range(2))
    jitter = 0.05 * size * (2 * rng.random(4) - 1)
    anchor = SceneObject(anchor_look, cx, cy, radii[0])
    target = SceneObject(looks[0], cx + reach * dx + jitter[0], cy + reach * dy + jitter[1], radii[1])
    # The other object is on a different side, so that the target is not the only object next to the anchor.
    other = names[(names.index(name) + 1 + int(rng.integers(3))) % 4]
    ox, oy = RELATIONS[other]
    decoy = SceneObject(looks[1], cx + reach * ox + jitter[2], cy + reach * oy + jitter[3], radii[2])
    if decoy.look.matches([anchor_look.color, anchor_look.shape]) or target.look.matches(
        [anchor_look.color, anchor_look.shape]
    ):
        return relation(rng, size, held_out)
    scene = draw_scene(rng, size, [anchor, decoy, target])
    side = f"{name} of" if dx else name
    anchor_name = f"{anchor_look.color} {anchor_look.shape}"
    prompt = f"the object {side} the {anchor_name}"
    answer = looks[0].phrase
    return Task(
        scene,
        scene.objects[2].mask,
        prompt,
        (),
        f"{name} of it there is the {answer}" if dx else f"{name} it there is the {answer}",
        prompt,
        answer,
    )


def odd_one_out(rng: Rng, size: int, held_out: bool) -> Task:
    """Several identical objects and one that differs in color or shape."""

    def draw(rng: Rng, size: int, held_out: bool = False) -> tuple[Scene, Look]:
        while True:
            look, odd = random_look(rng), random_look(rng, held_out)
            odd = replace(odd, texture=look.texture)
            if look.color != odd.color or look.shape != odd.shape:
                break
        return draw_scene(
            rng, size, make_objects(rng, size, [odd, *[look] * int(rng.integers(3, 5))], 0.09, 0.15)
        ), look

    scene, look = draw(rng, size, held_out)
    references = (
        draw_references(rng, size, lambda rng, size: shows(draw(rng, size)[0])) if rng.random() < 0.6 else ()
    )
    answer = scene.objects[0].look.phrase
    think = f"the others are each a {look.phrase} but one is a {answer}"
    return Task(
        scene,
        scene.objects[0].mask,
        "find the odd one out among the objects",
        references,
        think,
        "the object unlike the others",
        answer,
    )


def extreme_size(rng: Rng, size: int, held_out: bool) -> Task:
    """The largest or the smallest object."""
    largest = bool(rng.random() < 0.5)
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(2, 4))))]
    low, high = ((0.18, 0.23), (0.08, 0.13)) if largest else ((0.07, 0.09), (0.14, 0.19))
    objects = make_objects(rng, size, looks, *high)
    radius = random_radius(rng, size, *low)
    target = replace(objects[0], radius=radius)
    centers = place(rng, size, [radius])
    target = replace(target, cx=centers[0][0], cy=centers[0][1])
    rest = objects[1:]
    rest = [
        replace(o, cx=x, cy=y)
        for o, (x, y) in zip(rest, place(rng, size, [o.radius for o in rest], [target]), strict=True)
    ]
    scene = draw_scene(rng, size, [*rest, target])
    word, answer = "largest" if largest else "smallest", looks[0].phrase
    prompt = f"find the {word} object in the image"
    return Task(
        scene, scene.objects[-1].mask, prompt, (), f"the {word} is the {answer}", f"the {word} object", answer
    )


# CR: spatio-temporality


def tracking(rng: Rng, size: int, held_out: bool) -> Task:
    """An object is marked in the first frame and all objects move; find it in the last frame."""
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(1, 4))))]
    objects = make_objects(rng, size, looks, 0.09, 0.15)
    steps = 0.12 * size * (2 * rng.random((len(objects), 2)) - 1)
    moved = [_shifted(item, dx, dy, size) for item, (dx, dy) in zip(objects, steps, strict=True)]
    return _across(
        rng, size, objects, moved, draw_background(rng, size), "find the marked object in the last frame"
    )


def view(rng: Rng, size: int, held_out: bool) -> Task:
    """An object is marked in one view; the target shows the scene mirrored, or from a different distance."""
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(1, 4))))]
    objects = make_objects(rng, size, looks, 0.09, 0.14)
    zoom = 0.8 + 0.45 * float(rng.random())
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    middle = size / 2
    moved = [
        _shifted(
            replace(
                o,
                cx=middle + mirror * zoom * (o.cx - middle),
                cy=middle + zoom * (o.cy - middle),
                radius=o.radius * zoom,
            ),
            0,
            0,
            size,
        )
        for o in objects
    ]
    return _across(
        rng, size, objects, moved, draw_background(rng, size), "find the marked object from another view"
    )


def _shifted(item: SceneObject, dx: float, dy: float, size: int) -> SceneObject:
    """Move an object, clamped to the image."""
    low, high = item.radius * 0.95, size - item.radius * 0.95
    return replace(
        item, cx=float(min(max(item.cx + dx, low), high)), cy=float(min(max(item.cy + dy, low), high))
    )


def _across(
    rng: Rng,
    size: int,
    before: list[SceneObject],
    after: list[SceneObject],
    background: FloatArray,
    prompt: str,
) -> Task:
    """Create a task with one marked reference. The marked object is drawn last, so that nothing occludes it."""
    seed = int(rng.integers(2**31))
    first = draw_scene(np.random.default_rng(seed), size, before[::-1], background)
    scene = draw_scene(np.random.default_rng(seed), size, after[::-1], background)
    answer = before[0].look.phrase
    think = f"the marked object is the {answer}"
    return Task(scene, scene.objects[-1].mask, prompt, (shows(first, -1),), think, f"the {answer}", answer)
