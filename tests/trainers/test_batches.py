"""Tests for selecting and reordering completions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", "1.16")
from conceptseg_trainers.batches import best_and_worst, group_rows, select_rows


def make_batch(rows: list[int]) -> dict:
    """Return columns with values that identify their row; row n has n + 1 image patches in one image."""
    return {
        "completion_ids": torch.tensor(rows)[:, None],
        "advantages": torch.tensor(rows, dtype=torch.float32),
        "rollouts": [f"rollout {row}" for row in rows],
        "pixel_values": torch.cat([torch.full((row + 1, 2), float(row)) for row in rows]),
        "image_grid_thw": torch.tensor([[1, 1, row + 1] for row in rows]),
        "num_images": [1] * len(rows),
        "num_items_in_batch": torch.tensor(7),
        "text": "shared",
    }


def check_rows(batch: dict, rows: list[int]) -> None:
    expected = make_batch(rows)
    assert batch.keys() == expected.keys()
    assert batch["rollouts"] == expected["rollouts"] and batch["text"] == expected["text"]
    assert list(batch["num_images"]) == expected["num_images"]
    for name in (
        "completion_ids",
        "advantages",
        "pixel_values",
        "image_grid_thw",
        "num_items_in_batch",
    ):
        assert torch.equal(batch[name], expected[name]), name


def test_best_and_worst_of_each_group() -> None:
    values = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.2, 0.2, 0.2])
    assert best_and_worst(values, group_size=4, count=1) == [0, 1, 4, 7]
    assert best_and_worst(values, group_size=4, count=2) == list(range(8))
    assert best_and_worst(values, group_size=8, count=2) == [0, 1, 2, 7]


def test_select_rows_includes_images() -> None:
    check_rows(select_rows(make_batch([0, 1, 2, 3]), [1, 3]), [1, 3])


def test_completions_of_a_prompt_are_adjacent() -> None:
    batches = [make_batch([5, 0, 3]), make_batch([2, 4, 1])]
    prompts = {0: "a", 1: "b", 2: "b", 3: "a", 4: "b", 5: "b"}
    grouped = group_rows(batches, lambda batch, row: prompts[int(batch["completion_ids"][row, 0])])
    check_rows(grouped[0], [5, 2, 4])
    check_rows(grouped[1], [1, 0, 3])
