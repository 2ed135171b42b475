"""Tests of which object a completion of the VLM describes, which is what the CTM is trained to segment."""

from __future__ import annotations

import numpy as np
import pytest
from conceptseg_trainers.from_scratch.ctm_completions import (
    TARGET,
    UNKNOWN,
    CtmTask,
    DescribedObject,
    TaskObject,
)
from PIL import Image

from conceptseg_hf import ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.completion import Completion
from conceptseg_hf.coordinates import CoordinateFrame

SIZE = 100
LEFT, RIGHT, BELOW = (10, 10, 40, 40), (60, 10, 90, 40), (10, 60, 40, 90)
NOWHERE = (70, 70, 80, 80)


@pytest.fixture(scope="module")
def frame() -> CoordinateFrame:
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    return processor.prepare(Image.new("RGB", (SIZE, SIZE)), "red circle").coordinates


def mask_of(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def task_of(answer: str, objects: dict[tuple[int, int, int, int], str], *targets: tuple) -> CtmTask:
    described = tuple(TaskObject(mask_of(box), phrase, (1,)) for box, phrase in objects.items())
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    return CtmTask(pixels, mask_of(*targets), "prompt", (), "", "", answer, None, described)


CROSS_AND_CIRCLE = {LEFT: "blue cross", RIGHT: "red circle"}
TWO_CIRCLES = {LEFT: "red circle", RIGHT: "red circle", BELOW: "blue cross"}


@pytest.mark.parametrize(
    ("objects", "targets", "answer", "box", "expected", "is_named"),
    [
        (CROSS_AND_CIRCLE, [RIGHT], "red circle", RIGHT, TARGET, True),
        (CROSS_AND_CIRCLE, [RIGHT], "red circle", LEFT, TARGET, True),  # the answer singles it out
        (CROSS_AND_CIRCLE, [RIGHT], "red circle", NOWHERE, TARGET, True),
        (CROSS_AND_CIRCLE, [RIGHT], "red circle", None, TARGET, True),
        (CROSS_AND_CIRCLE, [RIGHT], "blue cross", LEFT, 0, True),
        (CROSS_AND_CIRCLE, [RIGHT], "blue cross", RIGHT, TARGET, False),
        (CROSS_AND_CIRCLE, [RIGHT], "blue cross", NOWHERE, UNKNOWN, False),
        (CROSS_AND_CIRCLE, [RIGHT], "blue cross", None, UNKNOWN, False),
        (TWO_CIRCLES, [RIGHT], "red circle", RIGHT, TARGET, False),
        (TWO_CIRCLES, [RIGHT], "red circle", LEFT, 0, False),  # the answer describes both, the box decides
        (TWO_CIRCLES, [RIGHT], "red circle", NOWHERE, UNKNOWN, False),
        (TWO_CIRCLES, [LEFT, RIGHT], "red circle", BELOW, TARGET, True),  # both are the target
        (TWO_CIRCLES, [BELOW], "blue cross", LEFT, TARGET, True),
    ],
)
def test_the_described_object(frame, objects, targets, answer, box, expected, is_named) -> None:
    task = task_of(objects[targets[0]], objects, *targets)
    text_box = None if box is None else frame.image_box_to_text(box)
    described = DescribedObject.of_completion(task, frame, Completion("", bbox=text_box, answer=answer))
    assert described.index == expected and described.is_named == is_named


def test_a_shorter_answer_describes_all_objects_with_its_words(frame) -> None:
    objects = {LEFT: "red circle", RIGHT: "blue circle"}
    completion = Completion("", bbox=frame.image_box_to_text(LEFT), answer="circle")
    assert DescribedObject.of_completion(task_of("circle", objects, RIGHT), frame, completion).index == 0


def test_an_absent_concept_stays_absent(frame) -> None:
    completion = Completion("", bbox=frame.image_box_to_text(LEFT), answer="green star")
    described = DescribedObject.of_completion(task_of("green star", CROSS_AND_CIRCLE), frame, completion)
    assert described.index == TARGET and not described.mask.any()
