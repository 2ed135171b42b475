"""Tests for the rewards: values computed by hand, and training with a plain GRPOTrainer."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint

pytest.importorskip("trl")
from conceptseg_trainers import box_reward, format_reward, mask_reward, meta_reward, split_reference_dataset


def write(bbox="[0,0,10,10]", check="[0,0,4,4]", answer="star", rule="same color", think="look"):
    parts = {"think": think, "rule": rule, "check": check, "bbox": bbox, "answer": answer}
    return "".join(f"<{tag}>{text}</{tag}>" for tag, text in parts.items() if text is not None)


BOX, CHECK = [0, 0, 10, 10], [0, 0, 4, 4]

# completion, ground-truth box, withheld box, R_format, R_meta, IoU(bbox)
CASES = {
    "all correct": (write(), BOX, CHECK, 1, 1.0, 1.0),
    "half of the target": (write(bbox="[0,0,5,10]"), BOX, CHECK, 1, 0.5, 0.5),
    "both boxes half": (write("[0,0,5,10]", "[0,0,4,2]"), BOX, CHECK, 1, 0.25, 0.5),
    "shifted by half": (write(bbox="[5,0,15,10]"), BOX, CHECK, 1, 50 / 150, 1 / 3),
    "wrong check": (write(check="[6,6,8,8]"), BOX, CHECK, 1, 0.0, 1.0),
    "wrong target": (write(bbox="[20,20,30,30]"), BOX, CHECK, 1, 0.0, 0.0),
    "swapped corners": (write("[10,10,0,0]", "[4,4,0,0]"), BOX, CHECK, 1, 1.0, 1.0),
    "one corner swapped": (write(bbox="[10,0,0,10]"), BOX, CHECK, 1, 1.0, 1.0),
    "out of the image": (write(bbox="[-10,0,10,10]"), BOX, CHECK, 1, 0.5, 0.5),
    "far out of the image": (write(bbox="[0,0,1000,1000]"), BOX, CHECK, 1, 1e-4, 1e-4),
    "decimals": (write(bbox="[0.0, 0.0, 2.5, 10.0]"), BOX, CHECK, 1, 0.25, 0.25),
    "check and target exchanged": (write("[0,0,4,4]", "[0,0,10,10]"), BOX, CHECK, 1, 0.16**2, 0.16),
    "missing check": (write(check=None), BOX, CHECK, 0, 0.0, 1.0),
    "unexpected check": (write(), BOX, None, 0, None, 1.0),
    "no proxy query": (write(bbox="[0,0,5,10]", check=None), BOX, None, 1, None, 0.5),
    "three numbers": (write(bbox="[0,0,10]"), BOX, CHECK, 0, 0.0, 0.0),
    "text instead of a box": (write(bbox="top left"), BOX, CHECK, 0, 0.0, 0.0),
    "no answer": (write(answer=""), BOX, CHECK, 0, 1.0, 1.0),
    "text before the tags": ("Sure! " + write(), BOX, CHECK, 0, 1.0, 1.0),
    "cut off in the answer": (write().partition("ar</answer>")[0], BOX, CHECK, 0, 1.0, 1.0),
    "cut off in the box": (write().partition("10]</bbox>")[0], BOX, CHECK, 0, 0.0, 0.0),
    "empty": ("", BOX, CHECK, 0, 0.0, 0.0),
    "absent, empty box": (write(bbox="[0,0,0,0]"), None, CHECK, 1, 1.0, 1.0),
    "absent, predicted box": (write(), None, CHECK, 1, 0.0, 0.0),
    "present, empty box": (write(bbox="[0,0,0,0]"), BOX, CHECK, 1, 0.0, 0.0),
}


def test_format_without_meta_reasoning() -> None:
    texts = [write(check=None, rule=None), write(check=None), write(rule=None), write()]
    columns = {"gt_check_box": [CHECK] * 4}
    assert format_reward(texts, meta_reasoning=False, **columns) == [1, 0, 0, 0]
    assert format_reward(texts, **columns) == [0, 0, 0, 1]


@pytest.mark.parametrize(("text", "box", "check", "form", "meta", "iou"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("conversation", [False, True], ids=["text", "conversation"])
def test_values_computed_by_hand(conversation, text, box, check, form, meta, iou) -> None:
    completions = [[{"role": "assistant", "content": text}]] if conversation else [text]
    columns = {"gt_box": [box], "gt_check_box": [check], "prompts": ["unused"]}
    assert format_reward(completions, **columns) == [form]
    assert meta_reward(completions, **columns) == [pytest.approx(meta) if meta is not None else None]
    assert box_reward(completions, **columns) == [pytest.approx(iou)]


def test_meta_reward_without_proxy() -> None:
    half = [write(bbox="[0,0,5,10]", check=None)]
    assert meta_reward(half, [BOX], [None], without_proxy="box") == [0.5]
    assert meta_reward(half, [BOX], [None], without_proxy="square") == [0.25]
    with pytest.raises(ValueError, match="without_proxy is 'zero'; use one of none, box, square"):
        meta_reward(half, [BOX], [None], without_proxy="zero")


def test_format_reward_without_gt_check_box() -> None:
    assert format_reward([write(), write(check=None), "star"]) == [1.0, 1.0, 0.0]


def mask(*rows: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in row] for row in rows])


@pytest.mark.parametrize(
    ("predicted", "ground_truth", "reward"),
    [
        (mask("xx", ".."), mask("xx", ".."), 1.0),
        (mask("xx", ".."), mask("x.", ".."), 0.5),
        (mask("xx", ".."), mask("..", "xx"), 0.0),
        (mask("xx", "x."), mask(".x", ".x"), 0.25),
        (mask("..", ".."), mask("..", ".."), 1.0),
        (mask("..", ".."), mask("x.", ".."), 0.0),
        (mask("x.", ".."), mask("..", ".."), 0.0),
    ],
)
def test_mask_reward_computed_by_hand(predicted, ground_truth, reward) -> None:
    image = Image.fromarray(ground_truth.astype(np.uint8) * 255)
    assert mask_reward(["any"], predicted_mask=[predicted], gt_mask=[image]) == [reward]


def test_mask_reward_needs_its_columns() -> None:
    with pytest.raises(ValueError, match="predicted_mask or gt_mask is missing"):
        mask_reward(["any"], gt_mask=[mask("x")])


def test_reward_names_in_the_log() -> None:
    assert [f.__name__ for f in (format_reward, mask_reward, meta_reward)] == ["format", "mask", "meta"]


def test_rewards_in_a_plain_grpo_trainer(nano_processor, shapes, tmp_path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        ConceptSegForSegmentation.from_pretrained(nano_checkpoint()).vlm,
        [format_reward, meta_reward],
        GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=64,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        split_reference_dataset(shapes, processor=nano_processor),
        processing_class=nano_processor.vlm_processor(),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/format/mean"] > 0.5 and log["rewards/meta/mean"] > 0


def test_meta_reward_uses_the_best_of_several_withheld_boxes():
    boxes = [[0, 0, 4, 4], [10, 10, 20, 20]]
    completions = [write(check=check) for check in ("[10,10,20,20]", "[0,0,4,2]", "[0,0,20,20]")]
    rewards = meta_reward(completions, [BOX] * 3, [boxes] * 3)
    assert rewards == pytest.approx([1.0, 0.5, 100 / 400])
    assert format_reward(completions[:1], [boxes]) == [1.0]
