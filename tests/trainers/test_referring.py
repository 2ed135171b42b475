"""Tests of referring expressions and of the stage that is trained on them."""

from __future__ import annotations

import numpy as np
import pytest
from conceptseg_trainers.from_scratch.vlm_examples import pad_examples
from conceptseg_trainers.nano.dense import GRID
from conceptseg_trainers.nano.referring import referring_expressions
from conceptseg_trainers.nano.scenes import TaskMix
from conceptseg_trainers.nano.vlm_data import RANDOM_CHOICE_FAMILIES, ReferringVlmData
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg_hf import parse_completion
from conceptseg_hf.data.concept_shapes.families.hidden_rule import KINDS, SELECTORS, Rule
from conceptseg_hf.data.concept_shapes.scenes import Look, SceneObject

SIZE = 128


@pytest.fixture(scope="module")
def mix() -> TaskMix:
    return TaskMix()


def circle(color: str, cx: float, cy: float, radius: float = 10.0) -> SceneObject:
    """Return an object with a mask of the right center."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    mask = (columns - cx) ** 2 + (rows - cy) ** 2 <= radius**2
    return SceneObject(Look("circle", color), cx, cy, radius, mask=mask)


def test_phrases_of_a_simple_scene() -> None:
    red, green, blue = circle("red", 20, 50, 16), circle("green", 90, 52), circle("blue", 40, 52, 6)
    phrases = dict(referring_expressions(np.random.default_rng(0), [red, green, blue], SIZE))
    assert phrases["the largest object"] is red and phrases["the smallest object"] is blue
    assert phrases["the leftmost object"] is red and phrases["the rightmost object"] is green
    assert "the highest object" not in phrases  # the lead is too small
    assert phrases["the object nearest to the red circle"] is blue
    assert phrases["the object farthest from the red circle"] is green
    assert phrases["the object left of the blue circle"] is red
    assert phrases["the object right of the blue circle"] is green
    assert "the object right of the red circle" not in phrases  # two objects


@given(number=st.integers(0, 3000))
@settings(max_examples=60)
def test_phrases_agree_with_the_rules_of_tasks(mix: TaskMix, number: int) -> None:
    task = mix.task(number)
    for phrase, item in referring_expressions(np.random.default_rng(number), task.scene.objects, SIZE):
        if phrase == task.rule and mix.family(number) in RANDOM_CHOICE_FAMILIES:
            assert np.array_equal(item.mask, task.mask), phrase


def test_no_phrase_is_a_held_out_rule(mix: TaskMix) -> None:
    words = {
        word: kind
        for number in range(60)
        for item in mix.task(number).scene.objects
        for kind, word in zip(KINDS, (item.look.color, item.look.shape, item.look.texture), strict=True)
    }
    attributes = 0
    for number in range(300):
        objects = mix.task(number).scene.objects
        for phrase, _ in referring_expressions(np.random.default_rng(number), objects, SIZE):
            selector = next((name for name in SELECTORS if f"the {name} " in phrase), None)
            word = next((word for word in phrase.split() if word in words and word != "object"), None)
            if selector and word:
                attributes += 1
                assert not Rule(((words[word], word),), selector).is_held_out, phrase
    assert attributes > 50


def test_perception_examples_locate_the_target_and_tasks_do_not_train_the_choice() -> None:
    data = ReferringVlmData(100, random_choice_families=RANDOM_CHOICE_FAMILIES)
    numbers = [n for n in range(400) if data.tasks.family(200_000 + n) in RANDOM_CHOICE_FAMILIES][:40]
    tokenizer, image_token = data.processor.tokenizer, data.processor.image_token_id
    located = 0
    for number in numbers:
        task = data.tasks.task(200_000 + number)
        text = tokenizer.decode(data._perception(0.5, number).completion)
        assert "<think>" not in text and "<answer>" not in text
        located += f"{task.rule}<bbox>" in text or f"{task.rule} : {task.answer}<bbox>" in text

        example = data.task_example(number)
        completion = parse_completion(tokenizer.decode(example.completion, skip_special_tokens=True), 100)
        untrained = tokenizer.decode([example.completion[i] for i in sorted(example.untrained)])
        numbers_of_box = [] if completion.bbox is None else [str(round(value)) for value in completion.bbox]
        assert untrained.split() == [*completion.answer.split(), *numbers_of_box, *completion.answer.split()]
        batch = pad_examples([example], image_token, tokenizer.pad_token_id, GRID, "cpu")
        trained = batch["labels"][batch["completion"]].tolist()
        assert len(trained) == len(example.completion) - len(example.untrained)
        start = len(example.prompt) - 1
        predicted = {int(column) - start for column in batch["attention_targets"][1]}
        assert not predicted & example.untrained
    assert located > 25  # of 40: at most six phrases are drawn from a scene


def test_choices_of_other_families_are_trained() -> None:
    data = ReferringVlmData(100, random_choice_families=RANDOM_CHOICE_FAMILIES)
    numbers = [n for n in range(100) if data.tasks.family(200_000 + n) not in RANDOM_CHOICE_FAMILIES]
    assert not any(data.task_example(n).untrained for n in numbers[:10])
