"""The training of the embedded checkpoint: its lessons, its questions, its loop, its recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conceptseg_trainers.nano.lessons import (
    DENSE_CLASSES,
    GRID,
    LessonWriter,
    dense_class_loss,
    dense_targets,
    shape_accuracy,
    sheet_scene,
    visible_things,
)
from conceptseg_trainers.nano.loop import Schedule, train
from conceptseg_trainers.nano.sam_stage import negative_question, positive_question
from conceptseg_trainers.nano.tokenizers import build_processor, build_sam_tokenizer, build_vlm_tokenizer
from conceptseg_trainers.nano.vlm_stage import patches, positions
from torch import nn

from conceptseg_hf import parse_completion
from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.families import GROUPS
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS

TASKS = range(2 * len(GROUPS))


@pytest.fixture(scope="module")
def writer() -> LessonWriter:
    return LessonWriter(build_processor())


def test_lessons_are_what_the_processor_makes(writer: LessonWriter) -> None:
    split = ConceptShapes("val")
    for index in TASKS:
        lesson, sample = writer.task_lesson(split.task(index)), split[index]
        prepared = writer.processor.prepare(sample.image, sample.prompt, sample.references)
        assert lesson.prompt == prepared.input_ids.tolist()
        torch.testing.assert_close(patches(lesson.pictures, "cpu"), prepared.pixel_values, rtol=0, atol=1e-5)


def test_positions_are_those_of_the_model(writer: LessonWriter) -> None:
    from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation

    model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano"))
    split = ConceptShapes("val")
    for index in (0, 4, 9):
        sample = split[index]
        batch = writer.processor.collate(
            [writer.processor.prepare(sample.image, sample.prompt, sample.references)]
        )
        expected, _ = model.vlm.model.get_rope_index(
            batch["input_ids"],
            batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch["attention_mask"],
        )
        assert np.array_equal(
            expected[:, 0].numpy(), positions(batch["input_ids"][0].tolist(), writer.processor.image_token_id)
        )


def test_ground_truth_completions_hold_the_template(writer: LessonWriter) -> None:
    split = ConceptShapes("val")
    for index in TASKS:
        task = split.task(index)
        text = writer.tokenizer.decode(writer.task_lesson(task).completion, skip_special_tokens=True)
        completion = parse_completion(text, 100)
        assert completion.is_valid, text
        assert (completion.think, completion.rule, completion.answer) == (task.think, task.rule, task.answer)


def test_focus_points_at_numbers_and_names(writer: LessonWriter) -> None:
    split = ConceptShapes("val")
    for index in TASKS:
        task = split.task(index)
        lesson = writer.task_lesson(task)
        words = writer.tokenizer.convert_ids_to_tokens(lesson.completion)
        for focus in lesson.focus:
            assert focus.tokens.shape == (GRID * GRID,) and focus.tokens.any()
            assert words[focus.position].isdigit() or words[focus.position] in task.answer.split()
        if task.mask.any():
            assert max(focus.picture for focus in lesson.focus) == len(lesson.pictures) - 1


def test_naming_lessons_name_each_unique_thing_once(writer: LessonWriter) -> None:
    scene = ConceptShapes("val").task(7).scene
    things = visible_things(scene)
    lesson = writer.naming_lesson(np.random.default_rng(0), scene.pixels, things)
    text = writer.tokenizer.decode(lesson.completion, skip_special_tokens=True)
    names = [thing.look.phrase for thing in things]
    assert all(text.count(name) >= 1 for name in names if names.count(name) == 1)


def test_finding_lessons_box_all_that_a_phrase_applies_to(writer: LessonWriter) -> None:
    several = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scene = sheet_scene(rng)
        lesson = writer.finding_lesson(rng, scene.pixels, visible_things(scene))
        text = writer.tokenizer.decode(lesson.completion, skip_special_tokens=True)
        found = re.findall(r"([a-z ]+)<bbox>(\[[0-9,]+\])</bbox>", text)
        assert 0 < len(found) <= 6 and len({phrase for phrase, _ in found}) == len(found)
        for phrase, box in found:
            words = phrase.split()
            several += sum(item.look.matches(words) for item in scene.objects) > 1
            expected = np.asarray(mask_to_box(scene.mask_of(words))) * 100 / scene.pixels.shape[0]
            assert np.abs(np.asarray(json.loads(box)) - expected).max() <= 0.5
    assert several > 0


def test_sheets_show_only_pairs_that_training_may_see() -> None:
    for seed in range(6):
        scene = sheet_scene(np.random.default_rng(seed))
        assert len(scene.objects) in (4, 9, 16) and all(item.mask.any() for item in scene.objects)
        assert not HELD_OUT_PAIRS & {(item.look.color, item.look.shape) for item in scene.objects}


def test_dense_heads_are_judged_by_what_each_place_shows() -> None:
    scene = sheet_scene(np.random.default_rng(0))
    classes = torch.from_numpy(dense_targets(visible_things(scene))[0])
    right = torch.cat(
        [nn.functional.one_hot(classes[:, i], size) for i, size in enumerate(DENSE_CLASSES.values())], dim=1
    )
    assert shape_accuracy(right, classes) == 1 and shape_accuracy(right.roll(1, dims=1), classes) == 0
    assert dense_class_loss(50.0 * right, classes) < 1e-6 < dense_class_loss(0.0 * right, classes)


def test_questions_to_sam_are_true() -> None:
    rng, split = np.random.default_rng(0), ConceptShapes("val")
    for index in TASKS:
        scene = split.task(index).scene
        question = positive_question(rng, scene)
        assert question.mask.any()
        negative = negative_question(rng, scene)
        assert not negative.mask.any() and negative.box is None


def test_tokenizers_know_every_word() -> None:
    vlm, sam = build_vlm_tokenizer(), build_sam_tokenizer()
    split = ConceptShapes("train")
    for index in range(10 * len(GROUPS)):
        task = split.task(index)
        for text in (task.prompt, task.think, task.rule, task.answer):
            assert vlm.unk_token_id not in vlm(text)["input_ids"], text
        assert sam.unk_token_id not in sam(task.answer)["input_ids"]
    text = (
        "<think>the red circle</think><rule>find it</rule>"
        "<check>[1,2,30,100]</check><bbox>[0,6,7,8]</bbox><answer>red circle</answer>"
    )
    assert vlm.decode(vlm(text)["input_ids"]) == text


class _Regression:
    """A stage small enough to run to its end in a moment."""

    name = "regression"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 1)
        self.killed_at: int | None = None

    def loss(self, step: int):
        if step == self.killed_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (self.module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.module.weight.sum().item()}


def test_a_killed_run_resumes_exactly(tmp_path) -> None:
    schedule = Schedule(steps=40, learning_rate=0.05, warmup=5, evaluate_every=100, save_every=7)
    whole = _Regression()
    expected = train(whole, schedule, tmp_path / "whole", report=lambda line: None)
    killed = _Regression()
    killed.killed_at = 25
    with pytest.raises(KeyboardInterrupt):
        train(killed, schedule, tmp_path / "killed", report=lambda line: None)
    resumed = _Regression()
    assert train(resumed, schedule, tmp_path / "killed", report=lambda line: None) == expected
    assert torch.equal(resumed.module.weight, whole.module.weight)


def test_the_rate_warms_up_again_where_other_parameters_begin() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10, restart=50, decay=0.25)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == rates[50] == 0.1 and rates[9] == rates[49] == rates[59] == rates[75] == 1
    assert rates[99] == pytest.approx(1 / 25)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    stage = _Regression()
    stage.loss = lambda step: (stage.module.weight.sum() * float("nan"), {})
    with pytest.raises(FloatingPointError, match="at step 0; lower the learning rate"):
        train(stage, Schedule(steps=3, learning_rate=0.1), tmp_path, report=lambda line: None)


@pytest.mark.slow
def test_the_recipe_makes_a_checkpoint(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "conceptseg_trainers.nano",
        "--run-dir",
        str(tmp_path / "run"),
        "--scale",
        "0.001",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    subprocess.run(command, check=True, capture_output=True)
    from transformers import AutoModel, AutoProcessor

    checkpoint = tmp_path / "run" / "checkpoint"
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    sample = ConceptShapes("val")[0]
    result = model.segment(processor(sample.image, sample.prompt, sample.references))[0]
    assert result.error is None and result.mask.size == sample.image.size
