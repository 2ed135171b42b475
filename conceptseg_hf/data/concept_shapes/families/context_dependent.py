"""CD: the concept depends on the relation of an object to its surroundings. Optical property to medical lesion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ....boxes import mask_to_box
from ..rendering import GREY, SHAPES, TEXTURES, FloatArray, to_uint8
from ..scenes import (
    Look,
    Scene,
    SceneObject,
    blob_coverage,
    draw_product,
    draw_scene,
    draw_tissue,
    make_objects,
    pick,
    place,
    random_look,
    random_radius,
    stroke_coverage,
)
from .task import Rng, Task, draw_references, shows

# CD: optical property


def transparent(rng: Rng, size: int, held_out: bool) -> Task:
    """A glass object that distorts what is behind it, among opaque ones."""

    def draw(rng: Rng, size: int) -> Scene:
        looks = [random_look(rng) for _ in range(int(rng.integers(1, 4)))]
        objects = make_objects(rng, size, looks)
        radius = random_radius(rng, size, 0.14, 0.22)
        glass = SceneObject(
            Look(pick(rng, SHAPES[:4]), kind="glass"), *place(rng, size, [radius], objects)[0], radius
        )
        return draw_scene(rng, size, [*objects, glass])

    scene = draw(rng, size)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size), -1))
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
        centers = place(rng, size, [item.radius for item in others], [shade])
        others = [replace(item, cx=x, cy=y) for item, (x, y) in zip(others, centers, strict=True)]
        return draw_scene(rng, size, [shade, *others])

    scene = draw(rng, size)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size)))
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
    """An object with the texture of its background; only its border is visible."""

    def draw(rng: Rng, size: int) -> Scene:
        radius = random_radius(rng, size, 0.14, 0.24)
        item = SceneObject(Look(pick(rng, SHAPES[:6]), kind="hidden"), *place(rng, size, [radius])[0], radius)
        return draw_scene(rng, size, [item])

    scene = draw(rng, size)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size)))
    answer = scene.objects[0].look.phrase
    think = f"the background goes on inside the {answer}"
    rule = "the object that blends into the background"
    return Task(
        scene, scene.objects[0].mask, "camouflaged object segmentation", references, think, rule, answer
    )


def saliency(rng: Rng, size: int, held_out: bool) -> Task:
    """One vivid, larger object among small gray ones."""

    def draw(rng: Rng, size: int, held_out: bool = False) -> Scene:
        look = random_look(rng, held_out)
        radius = random_radius(rng, size, 0.14, 0.22)
        item = SceneObject(look, *place(rng, size, [radius])[0], radius)
        gray_looks = [
            Look(pick(rng, SHAPES), GREY, pick(rng, TEXTURES)) for _ in range(int(rng.integers(2, 6)))
        ]
        others = make_objects(rng, size, gray_looks, 0.05, 0.1)
        centers = place(rng, size, [other.radius for other in others], [item])
        others = [replace(other, cx=x, cy=y) for other, (x, y) in zip(others, centers, strict=True)]
        return draw_scene(rng, size, [*others, item])

    scene = draw(rng, size, held_out)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size), -1))
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
            value: FloatArray | np.float32 = np.float32(225 if rng.random() < 0.6 else 50)
        else:
            radius = random_radius(rng, size, 0.07, 0.15)
            (cx, cy), *_ = place(rng, size, [radius * 1.2])
            coverage = blob_coverage(rng, size, cx, cy, radius)
            value = np.asarray((120, 84, 40) if kind == "stain" else (18, 18, 20), dtype=np.float32)
        return _with_region(image, coverage, value, 0.85, Look("circle", kind=kind))

    scene = draw(rng, size)
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size)))
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
    references = draw_references(rng, size, lambda rng, size: shows(draw(rng, size)))
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
    image: FloatArray, coverage: FloatArray, value: FloatArray | np.float32, opacity: float, look: Look
) -> Scene:
    """Create a scene with one irregular region, (S, S) coverage, blended into an image."""
    image = image + (value - image) * (coverage * np.float32(opacity))[:, :, None]
    mask = coverage > 0.5
    box = mask_to_box(mask)
    assert box is not None  # the region is in the image
    x1, y1, x2, y2 = box
    return Scene(
        to_uint8(image),
        (SceneObject(look, (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1) / 2, 0, mask),),
    )
