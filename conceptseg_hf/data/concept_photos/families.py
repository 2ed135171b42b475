"""The task families of ConceptPhotos: each composes a target, its references and the ground truth.

Families are grouped by the columns of the paper's Table 1. Objects of one photograph never occur both as target and as
distractor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..sample import Candidate
from .compositing import PhotoScene, Placement, compose, place
from .cutouts import ANY_OBJECT, Cutout, CutoutLibrary, Rng

_MAX_TRIES = 40
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class PhotoTask:
    """One task before it becomes a `ConceptSample`.

    Attributes:
        image: The target image.
        mask: (H, W) bool ground truth; empty if the concept is absent.
        prompt: The user prompt.
        references: Reference images, each with the (H, W) bool mask of its marked object, or None.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Noun phrase of 1 to 3 words.
        candidates: The target and the objects that could be mistaken for it.
    """

    image: Image.Image
    mask: np.ndarray
    prompt: str
    references: tuple[tuple[Image.Image, np.ndarray | None], ...]
    think: str
    rule: str
    answer: str
    candidates: tuple[Candidate, ...] = ()


class Studio:
    """Draws and composes with one random generator, and retries where objects do not fit.

    Args:
        library: Objects and backgrounds.
        rng: Random generator.
        size: Side length of all images.
    """

    def __init__(self, library: CutoutLibrary, rng: Rng, size: int) -> None:
        self.library, self.rng, self.size = library, rng, size

    def objects(self, count: int, noun: str | None = None, avoid: tuple[Cutout, ...] = ()) -> list[Cutout]:
        """Draw objects of different photographs and, without a noun, of different classes."""
        drawn: list[Cutout] = []
        for _ in range(count):
            drawn.append(self.library.draw(self.rng, noun, [*avoid, *drawn]))
        return drawn

    def scene(
        self,
        cutouts: list[Cutout],
        extents: tuple[float, float] = (0.2, 0.38),
        match: float = 0.35,
        background: Image.Image | None = None,
    ) -> PhotoScene:
        """Compose objects at random positions."""
        if background is None:
            background = self.background(cutouts)
        low, high = extents
        for attempt in range(_MAX_TRIES):
            shrink = 0.97**attempt
            placements = place(self.rng, cutouts, self.size, (low * shrink, high * shrink), match)
            if placements is not None:
                return compose(background, placements)
        raise ValueError(f"ConceptPhotos: {len(cutouts)} objects do not fit; use fewer or smaller ones.")

    def background(self, cutouts: Sequence[Cutout] = (), scenery: bool = False) -> Image.Image:
        """Draw a background that contains none of the objects; `scenery`: nor another dominant object."""
        return self.library.background(self.rng, self.size, cutouts, scenery)

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return bool(self.rng.random() < probability)


def _candidates(scene: PhotoScene, roles: list[str]) -> tuple[Candidate, ...]:
    return tuple(Candidate(role, mask) for role, mask in zip(roles, scene.masks, strict=True))


def _marked(scene: PhotoScene, index: int = 0) -> tuple[Image.Image, np.ndarray]:
    return scene.image, scene.masks[index]


def difference(studio: Studio) -> PhotoTask:
    """The reference shows the same place without one of the objects (with / without)."""
    new, *others = studio.objects(int(studio.rng.integers(2, 5)))
    background = studio.background([new, *others])
    scene = studio.scene([new, *others], background=background)
    before = compose(background, list(scene.placements[1:]))
    answer = new.noun
    return PhotoTask(
        scene.image,
        scene.masks[0],
        "what is new compared with the first picture",
        ((before.image, None),),
        f"the reference shows the place without one of the objects and the new one is the {answer}",
        "find what is only in the target image",
        answer,
        _candidates(scene, ["target"] + ["already there"] * len(others)),
    )


def same_kind(studio: Studio) -> PhotoTask:
    """The references mark objects of a class, or one object; find it among others."""
    classes = studio.library.named_classes
    noun = None
    if classes and studio.chance(0.5):
        noun = list(classes)[int(studio.rng.integers(len(classes)))]
        count = min(classes[noun], int(studio.rng.integers(2, 4)))
        target, *examples = studio.objects(count, noun)
    else:
        (target,) = studio.objects(1)
        examples = [target] * int(studio.rng.integers(1, 3))
    others = studio.objects(int(studio.rng.integers(1, 4)), avoid=(target, *examples))
    scene = studio.scene([target, *others])
    references = tuple(
        _marked(studio.scene([example, *studio.objects(1, avoid=(target, *examples, *others))]))
        for example in examples
    )
    answer = target.noun
    return PhotoTask(
        scene.image,
        scene.masks[0],
        "the same object as the marked one" if noun is None else "the same kind of object as the marked ones",
        references,
        f"the references mark the {answer} and here it is the {answer}",
        f"find the {answer}",
        answer,
        _candidates(scene, ["target"] + ["another object"] * len(others)),
    )


def tracking(studio: Studio) -> PhotoTask:
    """The reference marks an object; it has moved, and a similar object or others are beside it."""
    target, *others = studio.objects(int(studio.rng.integers(2, 4)))
    background = studio.background([target, *others])
    before = studio.scene([target, *others], background=background)
    after = studio.scene([target, *others], background=background)
    placements = [
        # Objects keep their orientation: a mirrored twin would be another object.
        replace(moved, mirrored=earlier.mirrored)
        for moved, earlier in zip(after.placements, before.placements, strict=True)
    ]
    scene = compose(background, placements)
    answer = target.noun
    return PhotoTask(
        scene.image,
        scene.masks[0],
        "the object marked in the first picture",
        (_marked(before),),
        f"the marked object has moved and here it is the {answer}",
        "find the marked object again",
        answer,
        _candidates(scene, ["target"] + ["another object"] * len(others)),
    )


def relation(studio: Studio) -> PhotoTask:
    """Two copies of an object on both sides of another one; the prompt says on which side the target is."""
    thing, anchor = studio.objects(2)
    size, rng = studio.size, studio.rng
    side = int(rng.integers(4))
    preposition = ("left of", "right of", "above", "below")[side]
    axis, sign = side // 2, (-1, 1)[side % 2]
    anchor_extent = int(size * rng.uniform(0.2, 0.28))
    extents = [int(size * rng.uniform(0.18, 0.26)) for _ in range(2)]
    centers = np.full((3, 2), size / 2) + rng.uniform(-0.06, 0.06, (3, 2)) * size
    centers[0, axis] += sign * 0.32 * size
    centers[1, axis] -= sign * 0.32 * size
    placements = [
        _centered(cutout, extent, center, size)
        for cutout, extent, center in zip(
            (thing, thing, anchor), (*extents, anchor_extent), centers, strict=True
        )
    ]
    scene = compose(studio.background([thing, anchor], scenery=True), placements)
    noun = ANY_OBJECT if thing.noun == anchor.noun else thing.noun
    other = studio.scene([anchor, *studio.objects(1, avoid=(thing, anchor))])
    prompt = f"the {noun} {preposition} the marked object"
    return PhotoTask(
        scene.image,
        scene.masks[0],
        prompt,
        (_marked(other),),
        f"the marked object is in the middle and {preposition} it is the {noun}",
        f"find the {noun} {preposition} the marked object",
        noun,
        _candidates(scene, ["target", "other side", "anchor"]),
    )


def ordinal(studio: Studio) -> PhotoTask:
    """Copies of one object in a row; the prompt counts them from one side."""
    (thing,) = studio.objects(1)
    size, rng = studio.size, studio.rng
    count = int(rng.integers(3, 5))
    place_number, from_left = int(rng.integers(count)), studio.chance(0.5)
    width = size / count
    placements = []
    for number in range(count):
        extent = int(width * rng.uniform(0.7, 0.92))
        center = np.asarray([(number + 0.5) * width, size * rng.uniform(0.35, 0.65)])
        placements.append(_centered(thing, extent, center, size))
    index = place_number if from_left else count - 1 - place_number
    order = [index, *(number for number in range(count) if number != index)]
    background = studio.background([thing], scenery=True)
    scene = compose(background, [placements[number] for number in order])
    noun = thing.noun
    prompt = f"the {_ORDINALS[place_number]} {noun} from the {'left' if from_left else 'right'}"
    return PhotoTask(
        scene.image,
        scene.masks[0],
        prompt,
        (),
        f"there are {count} of them in a row and the right one is the {noun}",
        f"find {prompt}",
        noun,
        _candidates(scene, ["target"] + ["another place"] * (count - 1)),
    )


def odd_one_out(studio: Studio) -> PhotoTask:
    """Several copies of one object and a single different object."""
    odd, thing = studio.objects(2)
    count = int(studio.rng.integers(3, 6))
    background = studio.background([odd, thing], scenery=True)
    scene = studio.scene([odd, *[thing] * count], extents=(0.17, 0.26), background=background)
    answer = odd.noun
    return PhotoTask(
        scene.image,
        scene.masks[0],
        "the odd one out",
        (),
        f"all objects are alike but one and it is the {answer}",
        "find the object that differs from the others",
        answer,
        _candidates(scene, ["target"] + ["one of many"] * count),
    )


def coexistence(studio: Studio, variant: int = 0) -> PhotoTask:
    """One target and one prompt: the references mark one of its objects or another (paper, Figure 5).

    Args:
        studio: Draws the same target for both variants.
        variant: Which of two objects the references mark.
    """
    first, second, *others = studio.objects(3)
    scene = studio.scene([first, second, *others])
    chosen = (first, second)[variant]
    references = tuple(
        _marked(studio.scene([chosen, *studio.objects(1, avoid=(first, second, *others))])) for _ in range(2)
    )
    roles = ["other reading", "other reading", "another object"]
    roles[variant] = "target"
    answer = chosen.noun
    return PhotoTask(
        scene.image,
        scene.masks[variant],
        "the object that is marked in the reference pictures",
        references,
        f"the same object is marked in all references and here it is the {answer}",
        "find the marked object",
        answer,
        _candidates(scene, roles),
    )


def absent(studio: Studio) -> PhotoTask:
    """The marked object is not in the target."""
    missing, *others = studio.objects(int(studio.rng.integers(3, 5)))
    scene = studio.scene(others)
    references = tuple(
        _marked(studio.scene([missing, *studio.objects(1, avoid=(missing, *others))])) for _ in range(2)
    )
    answer = missing.noun
    return PhotoTask(
        scene.image,
        np.zeros((studio.size, studio.size), dtype=bool),
        "the object that is marked in the reference pictures",
        references,
        f"the marked object is not here so there is no such {answer}",
        "find the marked object",
        answer,
    )


def camouflaged(studio: Studio) -> PhotoTask:
    """One object whose colors are matched to its surroundings."""
    (thing,) = studio.objects(1)
    scene = studio.scene([thing], extents=(0.3, 0.5), match=0.95)
    answer = thing.noun
    return PhotoTask(
        scene.image,
        scene.masks[0],
        "camouflaged object segmentation",
        (),
        f"one object has the colors of its surroundings and it is the {answer}",
        "find the object that blends into the background",
        answer,
    )


def _centered(cutout: Cutout, extent: int, center: np.ndarray, size: int) -> Placement:
    placement = Placement(cutout, 0, 0, extent)
    width, height = placement.size
    x = int(np.clip(round(center[0] - width / 2), 0, size - width))
    y = int(np.clip(round(center[1] - height / 2), 0, size - height))
    return replace(placement, x=x, y=y)


Family = Callable[..., PhotoTask]

FAMILIES: tuple[tuple[str, str, Family], ...] = (
    ("CR", "difference", difference),
    ("CR", "consistency", same_kind),
    ("CR", "spatio-temporality", tracking),
    ("CR", "rationality", relation),
    ("CR", "rationality", ordinal),
    ("CR", "rationality", odd_one_out),
    ("CR", "which one", coexistence),
    ("CR", "which one", coexistence),
    ("CR", "consistency", absent),
    ("CD", "camouflage", camouflaged),
)
"""Level, group and family of each position in a round; the two positions of `coexistence` share a target."""
