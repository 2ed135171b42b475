"""The task families of ConceptShapes: each function composes scenes into one task.

Families are grouped as the columns of the paper's Table 1. A family returns a `Task`: the target scene, the
true mask, the user's words, the references with their true boxes, and the ground-truth reasoning, which
always ends with the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .rendering import COLOURS, GREY, SHAPES, TEXTURES, BoolArray, FloatArray, draw_background, to_uint8
from .scenes import (
    HELD_OUT_PAIRS,
    Box,
    Look,
    Scene,
    SceneObject,
    blob_coverage,
    draw_product,
    draw_scene,
    draw_tissue,
    make_objects,
    mask_box,
    pick,
    place,
    random_look,
    random_radius,
    stroke_coverage,
)

Rng = np.random.Generator


@dataclass(frozen=True)
class Task:
    """One task before it becomes a `ConceptSample`.

    Attributes:
        scene: The target scene.
        mask: (S, S) true mask; empty when the concept is absent.
        prompt: The user's words.
        references: Reference scenes with the true box in each, or None where a reference carries no box.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Noun phrase of 1 to 3 words.
    """

    scene: Scene
    mask: BoolArray
    prompt: str
    references: tuple[tuple[Scene, Box | None], ...]
    think: str
    rule: str
    answer: str


def _shows(scene: Scene, index: int = 0) -> tuple[Scene, Box | None]:
    """A reference whose box is that of one of its objects."""
    return scene, scene.objects[index].box


def _reference_count(rng: Rng) -> int:
    """Mostly four references, as the paper's evaluation; sometimes one, two or three."""
    return int(rng.choice([4, 4, 4, 4, 3, 2, 1, 1]))


def _reference_size(size: int, count: int) -> int:
    """References of a mosaic are drawn at the size of a mosaic cell."""
    return size if count == 1 else size // 2


def _repeat(
    rng: Rng, size: int, draw: Callable[[Rng, int], tuple[Scene, Box | None]], count: int | None = None
) -> tuple:
    count = _reference_count(rng) if count is None else count
    return tuple(draw(rng, _reference_size(size, count)) for _ in range(count))


def _distractors(rng: Rng, count: int, avoid: Sequence[str]) -> list[Look]:
    """Looks that do not answer to all the given words."""
    looks: list[Look] = []
    while len(looks) < count:
        look = random_look(rng)
        if not look.answers_to(avoid):
            looks.append(look)
    return looks


def _words_for(rng: Rng, look: Look) -> list[str]:
    """Words for a look: its shape, with its colour, its texture, or both."""
    choice = rng.random()
    if choice < 0.25:
        return [look.shape]
    if choice < 0.75 or look.texture == "plain":
        return [look.colour, look.shape]
    return [look.texture, look.shape] if choice < 0.85 else [look.texture, look.colour, look.shape]


# CI: diverse classes


def attribute(rng: Rng, size: int, held_out: bool) -> Task:
    """All objects that answer to a shape, colour or texture; one in five scenes has two of them."""
    look = random_look(rng, held_out)
    words = _words_for(rng, look)
    looks = [look]
    if rng.random() < 0.2:
        looks.append(look)
    looks += _distractors(rng, int(rng.integers(1, 5 - len(looks) + 1)), words)
    scene = draw_scene(rng, size, make_objects(rng, size, looks))

    def reference(rng: Rng, size: int) -> tuple[Scene, Box]:
        twin = _look_with(rng, words, held_out and len(words) > 1)
        objects = make_objects(rng, size, [twin, *_distractors(rng, int(rng.integers(0, 3)), words)])
        return _shows(draw_scene(rng, size, objects))

    phrase = " ".join(words)
    references = _repeat(rng, size, reference) if rng.random() < 0.5 else ()
    return Task(
        scene,
        scene.mask_of(words),
        phrase,
        references,
        f"the user asks for the {phrase}",
        f"find the {phrase}",
        phrase,
    )


def _look_with(rng: Rng, words: Sequence[str], held_out: bool) -> Look:
    """A random look that answers to attribute words."""
    fixed: dict[str, str] = {}
    for word in words:
        kind = "colour" if word in COLOURS else "shape" if word in SHAPES else "texture"
        fixed[kind] = word
    return random_look(rng, held_out, **fixed)


def absent(rng: Rng, size: int, held_out: bool) -> Task:
    """A phrase that names nothing in the scene; half of the time one of its words fits something there."""
    objects = make_objects(rng, size, [random_look(rng) for _ in range(int(rng.integers(2, 5)))])
    scene = draw_scene(rng, size, objects)
    hard = rng.random() < 0.5
    while True:
        look = random_look(rng, held_out)
        words = _words_for(rng, look)
        near = any(
            set(words) & {item.look.shape, item.look.colour, item.look.texture} for item in scene.objects
        )
        if (
            near == hard
            and (not hard or len(words) > 1)
            and not any(item.look.answers_to(words) for item in scene.objects)
        ):
            break
    phrase = " ".join(words)
    return Task(
        scene,
        np.zeros((size, size), dtype=bool),
        phrase,
        (),
        f"there is no {phrase}",
        f"find the {phrase}",
        phrase,
    )


# CD: optical property


def transparent(rng: Rng, size: int, held_out: bool) -> Task:
    """A glass object that bends what lies behind it, among opaque ones."""

    def draw(rng: Rng, size: int) -> Scene:
        looks = [random_look(rng) for _ in range(int(rng.integers(1, 4)))]
        objects = make_objects(rng, size, looks)
        radius = random_radius(rng, size, 0.14, 0.22)
        glass = SceneObject(
            Look(pick(rng, SHAPES[:4]), kind="glass"), *place(rng, size, [radius], objects)[0], radius
        )
        return draw_scene(rng, size, [*objects, glass])

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size), -1))
    answer = scene.objects[-1].look.phrase
    think = f"light passes through the {answer}"
    return Task(
        scene,
        scene.objects[-1].mask,
        "transparent",
        references,
        think,
        "the object one can see through",
        answer,
    )


def shadow(rng: Rng, size: int, held_out: bool) -> Task:
    """A soft dark region on the ground, among objects."""

    def draw(rng: Rng, size: int) -> Scene:
        radius = random_radius(rng, size, 0.14, 0.24)
        shade = SceneObject(
            Look(pick(rng, ("circle", "bar", "diamond", "square")), kind="shadow"),
            *place(rng, size, [radius])[0],
            radius,
        )
        others = make_objects(rng, size, [random_look(rng) for _ in range(int(rng.integers(1, 4)))])
        centres = place(rng, size, [item.radius for item in others], [shade])
        others = [replace(item, cx=x, cy=y) for item, (x, y) in zip(others, centres, strict=True)]
        return draw_scene(rng, size, [shade, *others])

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size)))
    return Task(
        scene,
        scene.objects[0].mask,
        "shadow",
        references,
        "the ground is darker in the shadow",
        "the dark region",
        "shadow",
    )


# CD: camouflage, saliency, anomaly, lesion


def camouflage(rng: Rng, size: int, held_out: bool) -> Task:
    """An object that wears the texture of its background; only its border betrays it."""

    def draw(rng: Rng, size: int) -> Scene:
        radius = random_radius(rng, size, 0.14, 0.24)
        item = SceneObject(Look(pick(rng, SHAPES[:6]), kind="hidden"), *place(rng, size, [radius])[0], radius)
        return draw_scene(rng, size, [item])

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size)))
    answer = scene.objects[0].look.phrase
    think = f"the background goes on inside the {answer}"
    rule = "the object that blends into the background"
    return Task(
        scene, scene.objects[0].mask, "camouflaged object segmentation", references, think, rule, answer
    )


def saliency(rng: Rng, size: int, held_out: bool) -> Task:
    """One vivid, larger object among small grey ones."""

    def draw(rng: Rng, size: int, held_out: bool = False) -> Scene:
        look = random_look(rng, held_out)
        radius = random_radius(rng, size, 0.14, 0.22)
        item = SceneObject(look, *place(rng, size, [radius])[0], radius)
        dull = [Look(pick(rng, SHAPES), GREY, pick(rng, TEXTURES)) for _ in range(int(rng.integers(2, 6)))]
        others = make_objects(rng, size, dull, 0.05, 0.1)
        centres = place(rng, size, [other.radius for other in others], [item])
        others = [replace(other, cx=x, cy=y) for other, (x, y) in zip(others, centres, strict=True)]
        return draw_scene(rng, size, [*others, item])

    scene = draw(rng, size, held_out)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size), -1))
    answer = scene.objects[-1].look.phrase
    think = f"the eye goes first to the {answer}"
    return Task(
        scene,
        scene.objects[-1].mask,
        "salient object segmentation",
        references,
        think,
        "the object that stands out",
        answer,
    )


DEFECTS = ("scratch", "stain", "hole")


def anomaly(rng: Rng, size: int, held_out: bool) -> Task:
    """A scratch, stain or hole in a regular industrial surface."""

    def draw(rng: Rng, size: int) -> Scene:
        image = draw_product(rng, size)
        kind = pick(rng, DEFECTS)
        if kind == "scratch":
            x0, y0 = (size * (0.15 + 0.7 * float(rng.random())) for _ in range(2))
            reach = size * (0.25 + 0.2 * float(rng.random()))
            dx, dy = ((1.0, 0.35), (0.35, 1.0), (0.8, 0.7), (0.8, -0.7), (1.0, -0.3))[int(rng.integers(5))]
            x0, y0 = (
                min(x0, size * 0.95 - reach * dx),
                min(max(y0, size * 0.05 - reach * min(dy, 0)), size * 0.95 - reach * max(dy, 0)),
            )
            coverage = stroke_coverage(size, x0, y0, x0 + reach * dx, y0 + reach * dy, max(2.5, size / 26))
            value = np.float32(225 if rng.random() < 0.6 else 50)
        else:
            radius = random_radius(rng, size, 0.07, 0.15)
            (cx, cy), *_ = place(rng, size, [radius * 1.2])
            coverage = blob_coverage(rng, size, cx, cy, radius)
            value = np.asarray((120, 84, 40) if kind == "stain" else (18, 18, 20), dtype=np.float32)
        return _with_region(image, coverage, value, 0.85, Look("circle", kind=kind))

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size)))
    answer = scene.objects[0].look.phrase
    think = f"the pattern is broken by a {answer}"
    return Task(
        scene,
        scene.objects[0].mask,
        "industrial defect segmentation",
        references,
        think,
        "what breaks the regular pattern",
        answer,
    )


def lesion(rng: Rng, size: int, held_out: bool) -> Task:
    """An irregular region of slightly different tone in speckled tissue."""

    def draw(rng: Rng, size: int) -> Scene:
        radius = random_radius(rng, size, 0.1, 0.22)
        (cx, cy), *_ = place(rng, size, [radius * 1.2])
        coverage = blob_coverage(rng, size, cx, cy, radius)
        image = draw_tissue(rng, size)
        shift = np.asarray(
            ((-42, -46, -40), (-20, -50, -44), (38, 26, 18))[int(rng.integers(3))], dtype=np.float32
        )
        return _with_region(image, coverage, image + shift, 1.0, Look("circle", kind="lesion"))

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size)))
    think = "the tissue changes its tone in the lesion"
    return Task(
        scene,
        scene.objects[0].mask,
        "tissue lesion segmentation",
        references,
        think,
        "the region unlike healthy tissue",
        "lesion",
    )


def _with_region(
    image: FloatArray, coverage: FloatArray, value: FloatArray, opacity: float, look: Look
) -> Scene:
    """A scene of one irregular region, (S, S) coverage, blended into an image."""
    image = image + (value - image) * (coverage * np.float32(opacity))[:, :, None]
    mask = coverage > 0.5
    x1, y1, x2, y2 = mask_box(mask)
    return Scene(
        to_uint8(image),
        (SceneObject(look, (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1) / 2, 0, mask),),
    )


# CR: consistency


def common_attribute(rng: Rng, size: int, held_out: bool) -> Task:
    """The marked objects share a colour or a shape and nothing else; find the object that has it too."""
    look = random_look(rng, held_out)
    word = look.colour if rng.random() < 0.5 else look.shape
    scene = draw_scene(
        rng, size, make_objects(rng, size, [look, *_distractors(rng, int(rng.integers(1, 4)), [word])])
    )

    def reference(rng: Rng, size: int) -> tuple[Scene, Box]:
        objects = make_objects(
            rng, size, [_look_with(rng, [word], False), *_distractors(rng, int(rng.integers(0, 3)), [word])]
        )
        return _shows(draw_scene(rng, size, objects))

    prompt = "the object with what the marked objects share"
    thing = f"{word} object" if word in COLOURS else word
    references = _repeat(rng, size, reference, int(rng.choice([2, 3, 4, 4, 4])))
    think = f"the marked objects are each a {thing} and here it is the {look.phrase}"
    return Task(scene, scene.objects[0].mask, prompt, references, think, f"find the {thing}", look.phrase)


def same_object(rng: Rng, size: int, held_out: bool) -> Task:
    """The references mark one and the same object in different places; find it again among near twins."""
    look = random_look(rng, held_out)
    twins = [
        replace(
            look,
            colour=pick(
                rng, [c for c in COLOURS if c != look.colour and (c, look.shape) not in HELD_OUT_PAIRS]
            ),
        ),
        replace(
            look,
            shape=pick(
                rng, [s for s in SHAPES if s != look.shape and (look.colour, s) not in HELD_OUT_PAIRS]
            ),
        ),
    ]

    def draw(rng: Rng, size: int, count: int) -> Scene:
        extra = _distractors(rng, count, [look.colour, look.shape])
        return draw_scene(rng, size, make_objects(rng, size, [look, *extra]))

    scene = draw_scene(
        rng, size, make_objects(rng, size, [look, *twins, *_distractors(rng, 1, [look.colour, look.shape])])
    )
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size, int(rng.integers(0, 3)))))
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


def _other(rng: Rng, words: Sequence[str], word: str) -> str:
    return pick(rng, [other for other in words if other != word])


def same_part(rng: Rng, size: int, held_out: bool) -> Task:
    """Objects have a core of another colour; the references mark the core of one kind of object."""
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
            core = Look("circle", _other(rng, COLOURS, body.look.colour), kind="core")
            objects += [body, SceneObject(core, body.cx, body.cy, body.radius * 0.46)]
        return draw_scene(rng, size, objects)

    scene = draw(rng, size)
    references = _repeat(rng, size, lambda rng, size: _shows(draw(rng, size), 1))
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
    """The same scene twice; the second time one object is new."""
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(1, 4))))]
    objects = make_objects(rng, size, looks)
    background = draw_background(rng, size)
    seed = int(rng.integers(2**31))
    # Drawn from one seed, old objects first, so that they look the same both times.
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
    """The references mark one kind of object; the target holds several of that kind and one that is not."""
    look = random_look(rng)
    odd = random_look(rng, held_out, shape=_other(rng, SHAPES, look.shape))

    def reference(rng: Rng, size: int) -> tuple[Scene, Box]:
        return _shows(draw_scene(rng, size, make_objects(rng, size, [look] * int(rng.integers(1, 4)))))

    scene = draw_scene(rng, size, make_objects(rng, size, [odd, *[look] * int(rng.integers(2, 4))]))
    think = f"the marked objects are each a {look.shape} unlike the {odd.phrase}"
    prompt = "find the object that differs from the marked ones"
    # Here the check is to find an object of the marked kind, so that the proxy query verifies what
    # "different" is different from.
    return Task(
        scene,
        scene.objects[0].mask,
        prompt,
        _repeat(rng, size, reference),
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
    # The other object lies on another side: a name alone is not enough.
    other = names[(names.index(name) + 1 + int(rng.integers(3))) % 4]
    ox, oy = RELATIONS[other]
    decoy = SceneObject(looks[1], cx + reach * ox + jitter[2], cy + reach * oy + jitter[3], radii[2])
    if decoy.look.answers_to([anchor_look.colour, anchor_look.shape]) or target.look.answers_to(
        [anchor_look.colour, anchor_look.shape]
    ):
        return relation(rng, size, held_out)
    scene = draw_scene(rng, size, [anchor, decoy, target])
    side = f"{name} of" if dx else name
    anchor_name = f"{anchor_look.colour} {anchor_look.shape}"
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
    """Several equal objects and one that differs in colour or shape."""

    def draw(rng: Rng, size: int, held_out: bool = False) -> tuple[Scene, Look]:
        while True:
            look, odd = random_look(rng), random_look(rng, held_out)
            odd = replace(odd, texture=look.texture)
            if look.colour != odd.colour or look.shape != odd.shape:
                break
        return draw_scene(
            rng, size, make_objects(rng, size, [odd, *[look] * int(rng.integers(3, 5))], 0.09, 0.15)
        ), look

    scene, look = draw(rng, size, held_out)
    references = (
        _repeat(rng, size, lambda rng, size: _shows(draw(rng, size)[0])) if rng.random() < 0.6 else ()
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
    centres = place(rng, size, [radius])
    target = replace(target, cx=centres[0][0], cy=centres[0][1])
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
    """An object is marked in the first frame; all objects move; find it in the last frame."""
    looks = [random_look(rng, held_out), *(random_look(rng) for _ in range(int(rng.integers(1, 4))))]
    objects = make_objects(rng, size, looks, 0.09, 0.15)
    steps = 0.12 * size * (2 * rng.random((len(objects), 2)) - 1)
    moved = [_shifted(item, dx, dy, size) for item, (dx, dy) in zip(objects, steps, strict=True)]
    return _across(
        rng, size, objects, moved, draw_background(rng, size), "find the marked object in the last frame"
    )


def view(rng: Rng, size: int, held_out: bool) -> Task:
    """An object is marked in one view; the target shows the scene mirrored, nearer or farther."""
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
    """An object moved, and kept inside the image."""
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
    """One marked reference, one target. The marked object is drawn last, so that nothing hides it."""
    seed = int(rng.integers(2**31))
    first = draw_scene(np.random.default_rng(seed), size, before[::-1], background)
    scene = draw_scene(np.random.default_rng(seed), size, after[::-1], background)
    answer = before[0].look.phrase
    think = f"the marked object is the {answer}"
    return Task(scene, scene.objects[-1].mask, prompt, (_shows(first, -1),), think, f"the {answer}", answer)


Family = Callable[[Rng, int, bool], Task]

# Level, group (a column of the paper's Table 1) and families, in the order in which a split goes through
# them. "Diverse classes" comes three times in a round because it holds the absent-object negatives too.
GROUPS: tuple[tuple[str, str, tuple[Family, ...]], ...] = (
    ("CI", "diverse classes", (attribute,)),
    ("CD", "optical property", (transparent, shadow)),
    ("CD", "camouflage", (camouflage,)),
    ("CD", "saliency", (saliency,)),
    ("CI", "diverse classes", (attribute,)),
    ("CD", "industrial anomaly", (anomaly,)),
    ("CD", "medical lesion", (lesion,)),
    ("CR", "consistency", (common_attribute, same_object, same_part)),
    ("CI", "diverse classes", (absent,)),
    ("CR", "difference", (changed, differs)),
    ("CR", "rationality", (relation, odd_one_out, extreme_size)),
    ("CR", "spatio-temporality", (tracking, view)),
)
