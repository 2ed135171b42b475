"""Tests for the example images, the warning about the format reward, and the epoch."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from conceptseg_trainers.callbacks import (
    EpochCallback,
    ExampleImagesCallback,
    FormatOnlyWarning,
    TrainingExample,
)
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments


@pytest.fixture()
def example():
    ground_truth, prediction = np.zeros((2, 24, 32), dtype=bool)
    ground_truth[4:20, 4:12] = True
    prediction[4:20, 20:28] = True
    return TrainingExample(
        target=Image.new("RGB", (32, 24), (200, 200, 200)),
        gt_mask=ground_truth,
        predicted_mask=prediction,
        mosaic=Image.new("RGB", (64, 64), (0, 255, 0)),
        rule="the red ones",
        answer="red star",
        rewards={"format": 1.0, "mask": 0.25},
    )


@pytest.fixture()
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_example_shows_mosaic_ground_truth_and_prediction(example):
    assert example.caption == "rule: the red ones\nanswer: red star\nformat 1.00; mask 0.25"
    image = np.asarray(example.draw(height=96)).astype(int)
    # Tiles of 96, 128 and 128 pixels with margins of 10, below a title; masks are tinted blue.
    mosaic, ground_truth, prediction = (
        image[30 + 10 : 30 + 86, left : left + width] for left, width in ((10, 96), (116, 128), (254, 128))
    )
    assert (mosaic[..., 1] > mosaic[..., 0] + 200).all()

    def blue(tile, left, right):  # fraction of tinted pixels between two columns of the target
        part = tile[10:60, left * 4 : right * 4]
        return (part[..., 2] > part[..., 0] + 30).mean()

    assert blue(ground_truth, 5, 11) == 1 and blue(ground_truth, 21, 27) == 0
    assert blue(prediction, 5, 11) == 0 and blue(prediction, 21, 27) == 1


def test_example_without_rule_answer_and_mosaic(example):
    bare = TrainingExample(example.target, example.gt_mask, example.predicted_mask)
    assert bare.caption == "rule: none given\nanswer: none given"
    assert bare.draw().width < example.draw().width


def test_examples_are_drawn_once_and_by_the_main_process(example, args, tmp_path):
    trainer = SimpleNamespace(examples=[example] * 3, callback_handler=SimpleNamespace(callbacks=[]))
    callback = ExampleImagesCallback(trainer, every=5, count=2)
    state, control = TrainerState(), TrainerControl()

    def names():
        return sorted(path.name for path in (tmp_path / "examples").glob("*"))

    for step in range(1, 6):
        state.global_step = step
        callback.on_step_end(args, state, control)
        assert names() == (["step_000005_0.png", "step_000005_1.png"] if step == 5 else [])
    callback.on_evaluate(args, state, control)  # no new examples
    trainer.examples = [example]
    state.global_step = 7
    callback.on_evaluate(args, state, control)
    assert names()[-1] == "step_000007_0.png" and len(names()) == 3

    trainer.examples = [example]
    state.global_step, state.is_world_process_zero = 10, False
    callback.on_step_end(args, state, control)
    assert len(names()) == 3


def test_examples_are_logged_to_tensorboard(example, args, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(str(tmp_path / "events"))
    trainer = SimpleNamespace(
        examples=[example], callback_handler=SimpleNamespace(callbacks=[TensorBoardCallback(writer)])
    )
    state = TrainerState()
    state.global_step = 4
    ExampleImagesCallback(trainer, every=4, count=1).on_step_end(args, state, TrainerControl())
    writer.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    (image,) = events.Images("examples/0")
    assert (image.step, image.width, image.height) == (4, *example.draw().size)


def reward_logs(**series):
    return [
        {f"rewards/{name}/mean": value for name, value in zip(series, values)}
        for values in zip(*series.values())
    ]


RISING = [0.1 * step for step in range(10)]
FLAT = [0.2] * 10


@pytest.mark.parametrize(
    ("logs", "warned"),
    [
        (reward_logs(format=RISING, mask=FLAT, meta=FLAT), True),
        (reward_logs(format=RISING, mask=FLAT[::-1], meta=[0.3 - value / 5 for value in RISING]), True),
        (reward_logs(format=RISING, mask=RISING, meta=FLAT), False),
        (reward_logs(format=FLAT, mask=FLAT, meta=FLAT), False),
        (reward_logs(format=RISING, meta=[float("nan")] * 10, mask=FLAT), True),
        (reward_logs(format=RISING, meta=[None] * 9 + [0.9], mask=FLAT), True),
        (reward_logs(format=RISING), False),
        (reward_logs(mask=FLAT), False),
        ([{"loss": 1.0}] * 10, False),
    ],
)
def test_warns_if_only_the_format_reward_increases(logs, warned, args, caplog):
    callback, state = FormatOnlyWarning(window=5), TrainerState()
    with caplog.at_level(logging.WARNING, logger="conceptseg_trainers.callbacks"):
        for entry in logs:
            callback.on_log(args, state, TrainerControl(), logs=entry)
    assert ("Only the format reward increases (format +0.50" in caplog.text) is warned


def test_epoch_of_a_resumed_run(args):
    epochs = []
    callback, state = EpochCallback(epochs.append), TrainerState()
    for epoch in (None, 0, 1.0, 1.25):
        state.epoch = epoch
        callback.on_epoch_begin(args, state, TrainerControl())
    assert epochs == [0, 0, 1, 1]
