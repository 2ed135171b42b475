"""Tests of the training of the embedded checkpoint: examples, prompts of SAM 3, the training loop and the command."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from conceptseg_trainers.from_scratch.loop import Schedule, train
from conceptseg_trainers.from_scratch.masks import mask_to_tokens
from conceptseg_trainers.from_scratch.vlm_examples import patches, positions
from conceptseg_trainers.from_scratch.vlm_stage import number_distance
from conceptseg_trainers.nano.__main__ import main
from conceptseg_trainers.nano.dense import (
    DENSE_CLASSES,
    GRID,
    dense_class_loss,
    dense_targets,
    shape_accuracy,
    visible_objects,
)
from conceptseg_trainers.nano.evidence.ctm_runs import train_ctm
from conceptseg_trainers.nano.examples import ExampleWriter
from conceptseg_trainers.nano.sam_data import guidance_targets, negative_prompt, positive_prompt
from conceptseg_trainers.nano.scenes import TaskMix, sheet_scene
from conceptseg_trainers.nano.tokenizers import build_processor, build_sam_tokenizer, build_vlm_tokenizer
from conceptseg_trainers.nano.vlm_data import RANDOM_CHOICE_FAMILIES, ShapesVlmData, make_stage
from safetensors.torch import load_file
from torch import nn

from conceptseg_hf import parse_completion
from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.families import GROUPS
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS
from conceptseg_hf.vlm_families import DEFAULT_FAMILY

SIZE = 128
TASKS = range(200_000, 200_024)  # numbers of tasks of all groups


@pytest.fixture(scope="module")
def writer() -> ExampleWriter:
    return ExampleWriter(build_processor())


@pytest.fixture(scope="module")
def mix() -> TaskMix:
    return TaskMix()


def sources() -> list[tuple[ConceptShapes, range]]:
    """Return benchmarks, and indices of tasks that cover all families."""
    groups = [ConceptShapes("val", size=SIZE, groups=[name]) for name in ("which one", "hidden rule")]
    return [
        (ConceptShapes("val", size=SIZE), range(2 * len(GROUPS))),
        *((group, range(8)) for group in groups),
    ]


def test_task_examples_equal_the_inputs_of_the_processor(writer: ExampleWriter) -> None:
    for split, indices in sources():
        for index in indices:
            example = writer.task(np.random.default_rng(0), split.task(index))
            sample = split[index]
            prepared = writer.processor.prepare(sample.image, sample.prompt, sample.references)
            assert example.prompt == prepared.input_ids.tolist()
            torch.testing.assert_close(
                patches(example.images, 8, "cpu"), prepared.pixel_values, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("preset", ["nano", "nano-qwen3"])
def test_positions_equal_those_of_the_model(writer: ExampleWriter, preset: str) -> None:
    from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation

    model = ConceptSegForSegmentation(ConceptSegConfig.from_preset(preset))
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
            expected[:, 0].numpy(),
            positions(batch["input_ids"][0].tolist(), writer.processor.image_token_id, GRID),
        )


def test_ground_truth_completions_follow_the_template(writer: ExampleWriter) -> None:
    for split, indices in sources():
        for index in indices:
            task = split.task(index)
            example = writer.task(np.random.default_rng(0), task)
            completion = parse_completion(
                writer.tokenizer.decode(example.completion, skip_special_tokens=True), 100
            )
            assert completion.is_valid, completion.text
            assert (completion.think, completion.rule, completion.answer) == (
                task.think,
                task.rule,
                task.answer,
            )


def test_noise_changes_only_the_input_of_the_vlm(writer: ExampleWriter, mix: TaskMix) -> None:
    changed = 0
    for number in TASKS:
        example = writer.task(np.random.default_rng(number), mix.task(number))
        assert len(example.noisy_completion) == len(example.completion)
        changed += sum(a != b for a, b in zip(example.noisy_completion, example.completion))
    assert changed


def test_chosen_object_changes_the_completion_but_not_rule_and_check(
    writer: ExampleWriter, mix: TaskMix
) -> None:
    differ = 0
    for number in TASKS:
        task = mix.task(number)
        others = [
            i
            for i, item in enumerate(task.scene.objects)
            if item.mask.any() and not np.array_equal(item.mask, task.mask)
        ]
        if not others:
            continue
        texts = [
            writer.tokenizer.decode(
                writer.task(np.random.default_rng(0), task, chosen).completion, skip_special_tokens=True
            )
            for chosen in (None, others[0])
        ]
        correct, other = (parse_completion(text, 100) for text in texts)
        assert (correct.rule, correct.check) == (other.rule, other.check) and other.is_valid
        box = np.asarray(mask_to_box(task.scene.objects[others[0]].mask)) * 100 / SIZE
        assert np.abs(np.asarray(other.bbox) - box).max() <= 0.5
        differ += correct.bbox != other.bbox
    assert differ > 5


def test_random_choice_families_have_the_correct_object_only_by_chance() -> None:
    data = ShapesVlmData(10, random_choice_families=RANDOM_CHOICE_FAMILIES)
    regular = ShapesVlmData(10)
    numbers = [n for n in range(400) if data.tasks.family(200_000 + n) in RANDOM_CHOICE_FAMILIES][:40]
    others = [n for n in range(400) if data.tasks.family(200_000 + n) not in RANDOM_CHOICE_FAMILIES][:8]
    assert all(data.task_example(n).completion == regular.task_example(n).completion for n in others)
    same = [data.task_example(n).completion == regular.task_example(n).completion for n in numbers]
    assert 0 < sum(same) < 0.6 * len(same)


def test_short_completions_have_neither_rule_nor_check(writer: ExampleWriter, mix: TaskMix) -> None:
    for number in TASKS:
        task = mix.task(number)
        example = writer.task(np.random.default_rng(0), task, short=True)
        text = writer.tokenizer.decode(example.completion, skip_special_tokens=True)
        completion = parse_completion(text, 100, expect_check=False, expect_rule=False)
        assert completion.is_valid and completion.answer == task.answer
        source, index = mix.locate(number)
        sample = source[index]
        prepared = writer.short_processor.prepare(sample.image, sample.prompt, sample.references)
        assert example.prompt == prepared.input_ids.tolist()
    full = writer.task(np.random.default_rng(0), task)
    assert full.prompt != example.prompt and len(full.completion) > len(example.completion)


def test_the_expected_distance_prefers_the_median_to_a_frequent_border() -> None:
    # A fifth of the numbers is 100, the others are spread, so that 100 is the most frequent and no median.
    targets = torch.cat([torch.arange(20, 80), torch.full((15,), 100)])
    chosen = {}
    for weight in (0.0, 40.0):
        logits = torch.zeros(101, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(600):
            log_probabilities = logits.log_softmax(0).expand(len(targets), -1)
            cross_entropy = -log_probabilities.gather(1, targets[:, None]).mean()
            loss = cross_entropy + weight * number_distance(log_probabilities, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        chosen[weight] = int(logits.argmax())
    assert chosen[0.0] == 100
    assert abs(chosen[40.0] - float(targets.float().median())) <= 5


def test_the_distance_of_numbers_is_a_fraction_of_the_scale() -> None:
    certain = torch.full((2, 101), -torch.inf)
    certain[0, 30] = certain[1, 100] = 0.0
    assert number_distance(certain, torch.tensor([50, 0])).item() == pytest.approx((0.2 + 1.0) / 2)
    uniform = torch.zeros(1, 101).log_softmax(1)
    assert number_distance(uniform, torch.tensor([0])).item() == pytest.approx(0.5)


def test_attention_targets_are_image_tokens_of_numbers_and_words(writer: ExampleWriter, mix: TaskMix) -> None:
    for number in TASKS:
        task = mix.task(number)
        example = writer.task(np.random.default_rng(0), task)
        words = writer.tokenizer.convert_ids_to_tokens(example.completion)
        text_words = {*task.answer.split(), *task.think.split()}
        target_image = len(example.images) - 1
        for target in example.attention_targets:
            assert target.tokens and all(tokens.shape == (GRID * GRID,) for tokens in target.tokens.values())
            assert any(tokens.any() for tokens in target.tokens.values())
            assert words[target.position].isdigit() or words[target.position] in text_words
        if task.mask.any():
            assert any(target_image in target.tokens for target in example.attention_targets)


def test_naming_contains_each_unique_object(writer: ExampleWriter) -> None:
    scene = ConceptShapes("val", size=SIZE).task(7).scene
    objects = visible_objects(scene)
    example = writer.naming(np.random.default_rng(0), scene.pixels, objects)
    text = writer.tokenizer.decode(example.completion, skip_special_tokens=True)
    names = [item.look.phrase for item in objects]
    assert all(text.count(name) >= 1 for name in names if names.count(name) == 1)


def test_finding_locates_all_objects_that_a_phrase_describes(writer: ExampleWriter) -> None:
    several = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scene = sheet_scene(rng)
        example = writer.finding(rng, scene.pixels, visible_objects(scene))
        text = writer.tokenizer.decode(example.completion, skip_special_tokens=True)
        entries = re.findall(r"([a-z ]+)<bbox>(\[[0-9,]+\])</bbox>", text)
        assert 0 < len(entries) <= 6 and len({phrase for phrase, _ in entries}) == len(entries)
        for phrase, box in entries:
            words = phrase.split()
            several += sum(item.look.matches(words) for item in scene.objects) > 1
            expected = np.asarray(mask_to_box(scene.mask_of(words))) * 100 / scene.pixels.shape[0]
            assert np.abs(np.asarray(json.loads(box)) - expected).max() <= 0.5
    assert several > 0


def test_marked_objects_are_those_with_a_drawn_box(writer: ExampleWriter, mix: TaskMix) -> None:
    checked = 0
    for number in TASKS:
        task = mix.task(number)
        if not any(box is not None for _, box in task.references):
            continue
        mosaic, objects, frame = writer._mosaic(task)
        marked = [item for item in objects if item.marked]
        assert len(marked) <= sum(box is not None for _, box in task.references) - (frame.proxy is not None)
        for item in marked:
            x1, y1, x2, y2 = mask_to_box(item.mask)
            border = mosaic[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3].reshape(-1, 3)
            assert (border == (255, 0, 0)).all(1).any()
            checked += 1
    assert checked > 10


def test_sheets_contain_no_held_out_pairs() -> None:
    for seed in range(6):
        scene = sheet_scene(np.random.default_rng(seed))
        assert len(scene.objects) in (4, 9, 16) and all(item.mask.any() for item in scene.objects)
        assert not HELD_OUT_PAIRS & {(item.look.color, item.look.shape) for item in scene.objects}


def test_dense_loss_and_accuracy_of_correct_and_wrong_logits() -> None:
    scene = sheet_scene(np.random.default_rng(0))
    classes = torch.from_numpy(dense_targets(visible_objects(scene))[0])
    correct = torch.cat(
        [nn.functional.one_hot(classes[:, i], size) for i, size in enumerate(DENSE_CLASSES.values())], dim=1
    )
    assert shape_accuracy(correct, classes) == 1 and shape_accuracy(correct.roll(1, dims=1), classes) == 0
    assert dense_class_loss(50.0 * correct, classes) < 1e-6 < dense_class_loss(0.0 * correct, classes)


def test_sam_prompts_have_correct_masks(mix: TaskMix) -> None:
    rng, boxes = np.random.default_rng(0), 0
    for number in TASKS:
        scene = mix.task(number).scene
        positive = positive_prompt(rng, scene)
        assert positive.mask.any()
        if positive.box is not None:
            assert any(np.array_equal(positive.mask, item.mask) for item in scene.objects)
            boxes += 1
        negative = negative_prompt(rng, scene)
        assert not negative.mask.any() and negative.box is None
    assert boxes


def test_guidance_targets_are_the_word_at_the_objects_that_it_describes() -> None:
    rng = np.random.default_rng(1)
    scene = sheet_scene(rng)
    while (prompt := positive_prompt(rng, scene)).box is not None:
        pass
    targets, guided = guidance_targets(scene, prompt, prompt_length=10, grid=GRID)
    assert targets.shape == (4, GRID * GRID, 10) and guided.any()
    for head in np.flatnonzero(guided):
        single = targets[head].sum(1) == 1
        assert single.any() and not single.all()
    described = np.any([targets[head].sum(1) == 1 for head in np.flatnonzero(guided)], axis=0)
    assert described[mask_to_tokens(prompt.mask, GRID)].mean() > 0.5


def test_tokenizers_contain_all_words_of_tasks() -> None:
    vlm, sam = build_vlm_tokenizer(), build_sam_tokenizer()
    mix = TaskMix()
    for number in range(160):
        task = mix.task(number)
        for text in (task.prompt, task.think, task.rule, task.answer):
            assert vlm.unk_token_id not in vlm(text)["input_ids"], text
        assert sam.unk_token_id not in sam(task.answer)["input_ids"]
    text = (
        "<think>the red circle</think><rule>find it</rule>"
        "<check>[1,2,30,100]</check><bbox>[0,6,7,8]</bbox><answer>red circle</answer>"
    )
    assert vlm.decode(vlm(text)["input_ids"]) == text


class _Regression:
    """A small linear regression."""

    name = "regression"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 1)
        self.stop_at: int | None = None

    def loss(self, step: int):
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (self.module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.item()}

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.module.weight.sum().item()}


def test_interrupted_run_resumes_exactly(tmp_path) -> None:
    schedule = Schedule(steps=40, learning_rate=0.05, warmup=5, evaluate_every=100, save_every=7)
    whole = _Regression()
    expected = train(whole, schedule, tmp_path / "whole", report=lambda line: None)
    stopped = _Regression()
    stopped.stop_at = 25
    with pytest.raises(KeyboardInterrupt):
        train(stopped, schedule, tmp_path / "stopped", report=lambda line: None)
    resumed = _Regression()
    assert train(resumed, schedule, tmp_path / "stopped", report=lambda line: None) == expected
    assert torch.equal(resumed.module.weight, whole.module.weight)


def test_state_of_another_model_is_refused(tmp_path) -> None:
    """As when a VLM of another family is trained in the same folder."""
    schedule = Schedule(steps=2, learning_rate=0.05)
    train(_Regression(), schedule, tmp_path, report=lambda line: None)
    wider, renamed = _Regression(), _Regression()
    wider.module = nn.Linear(3, 2)
    renamed.module = nn.Sequential(nn.Linear(3, 1))
    for stage in (wider, renamed):
        with pytest.raises(
            ValueError, match=r"state\.safetensors' is the state of another model .*--run-dir"
        ):
            train(stage, schedule, tmp_path, report=lambda line: None)


def test_learning_rate_warms_up_again_at_the_restart() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=10, restart=50, decay=0.25)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == rates[50] == 0.1 and rates[9] == rates[49] == rates[59] == rates[75] == 1
    assert rates[99] == pytest.approx(1 / 25)


def test_nonfinite_loss_stops_the_run(tmp_path) -> None:
    stage = _Regression()
    stage.loss = lambda step: (stage.module.weight.sum() * float("nan"), {})
    with pytest.raises(FloatingPointError, match="at step 0; lower the learning rate"):
        train(stage, Schedule(steps=3, learning_rate=0.1), tmp_path, report=lambda line: None)


@pytest.mark.parametrize("preset", ["nano", "nano-qwen3"])
def test_loss_of_the_vlm_stage_reaches_all_parameters(preset: str) -> None:
    """Also the parameters of Qwen3-VL's DeepStack."""
    stage = make_stage(pretraining=1, steps=2, held_out=1, preset=preset)
    examples = stage.data.examples(1)[:3]
    assert all(example.images for example in examples)
    loss, parts = stage.example_loss(examples)
    loss.backward()
    assert np.isfinite(loss.item()) and parts["focus"] > 0
    without = {
        name
        for name, parameter in stage.module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert not without


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("family", [DEFAULT_FAMILY, "qwen3_vl"])
def test_command_trains_a_checkpoint(tmp_path, monkeypatch, family: str) -> None:
    command = [
        sys.executable,
        "-m",
        "conceptseg_trainers.nano",
        "--family",
        family,
        "--run-dir",
        str(tmp_path / "run"),
        "--scale",
        "0.001",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", command[2:])
    main()  # it starts processes for two of its stages
    from transformers import AutoModel, AutoProcessor

    checkpoint = tmp_path / "run" / "checkpoint"
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    sample = ConceptShapes("val")[0]
    result = model.segment(processor(sample.image, sample.prompt, sample.references))[0]
    assert result.error is None and result.mask.size == sample.image.size
    assert model.config.vlm_config.model_type == processor.vlm_family == family
    if family != DEFAULT_FAMILY:
        return

    # The start of reinforcement learning.
    for stage in ("base", "base-referring", "base-ctm"):
        monkeypatch.setattr(sys, "argv", [*command[2:], "--stage", stage])
        main()
    base = load_file(tmp_path / "run" / "base" / "state.safetensors")
    continued = load_file(tmp_path / "run" / "base-referring" / "state.safetensors")
    weights = load_file(tmp_path / "run" / "base-checkpoint" / "model.safetensors")
    name = "model.language_model.norm.weight"
    start, trained = (state[f"average/vlm.{name}"] for state in (base, continued))
    assert 0 < (start - trained).abs().max() < 0.1  # it continues from the stage "base"
    torch.testing.assert_close(weights[f"vlm.{name}"], trained.half(), rtol=0, atol=0)

    # Another CTM with the same VLM, SAM 3 and completions.
    completions = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run/completions").rglob("*.safetensors")
    }
    other = train_ctm(checkpoint, tmp_path / "run", 2, 1, scale=0.001)
    trained = AutoModel.from_pretrained(other)
    assert trained.config.ctm_config.num_queries == 2
    assert all(
        torch.equal(a, b) for a, b in zip(trained.vlm.parameters(), model.vlm.parameters(), strict=True)
    )
    assert {path: path.stat().st_mtime_ns for path in completions} == completions
    assert train_ctm(checkpoint, tmp_path / "run", 2, 1) == other  # not trained again
