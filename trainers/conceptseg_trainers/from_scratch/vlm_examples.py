"""Training examples of the VLM, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MERGE = 2  # patches per side of an image token


@dataclass(frozen=True)
class AttentionTarget:
    """Image tokens that the VLM should attend to when it predicts a token of the completion.

    Attributes:
        position: Index of the token within the completion.
        tokens: (N,) bool masks of image tokens by the index of the image; any of them is correct.
    """

    position: int
    tokens: dict[int, np.ndarray]


@dataclass(frozen=True)
class TrainingExample:
    """One training sequence.

    Attributes:
        images: (S, S, 3) 8-bit images.
        prompt: Token ids of the prompt, with expanded image tokens.
        completion: Token ids of the completion with its end token.
        noisy_completion: The completion as the input of the VLM, in which some words are replaced.
        attention_targets: Attention targets of some tokens of the completion.
        dense: Dense targets of each image; see `VlmData.dense_loss`.
        untrained: Indices of tokens of the completion that are input only; their prediction is not trained.
    """

    images: tuple[np.ndarray, ...]
    prompt: list[int]
    completion: list[int]
    noisy_completion: list[int]
    attention_targets: tuple[AttentionTarget, ...]
    dense: tuple[Any, ...]
    untrained: frozenset[int] = frozenset()


def patches(images: Sequence[np.ndarray], size: int, device: str) -> Tensor:
    """Convert 8-bit images (S, S, 3) to Qwen's patches (N * (S / size)^2, 3 * size^2), grouped by image token."""
    n, side = len(images), images[0].shape[0]
    cells = side // size // MERGE
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
    mean_, std = (
        torch.tensor(values, device=device)[None, :, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    x = ((x - mean_) / std).reshape(n, 3, cells, MERGE, size, cells, MERGE, size)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * (side // size) ** 2, 3 * size * size)


def positions(ids: Sequence[int], image_token: int, grid: int) -> np.ndarray:
    """Return Qwen's position ids (3, L) of (time, row, column).

    The position increases by one with each text token, and by `grid`, the number of image tokens per side, with each
    image.
    """
    token_ids = np.asarray(ids)
    result = np.zeros((3, len(token_ids)), dtype=np.int64)
    index = position = 0
    while index < len(token_ids):
        if token_ids[index] != image_token:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        span = slice(index, index + grid * grid)
        result[0, span] = position
        result[1, span] = position + np.arange(grid * grid) // grid
        result[2, span] = position + np.arange(grid * grid) % grid
        index, position = index + grid * grid, position + grid
    return result


def pad_examples(
    examples: Sequence[TrainingExample], image_token: int, pad: int, grid: int, device: str
) -> dict[str, Any]:
    """Convert examples to tensors, padded on the right.

    Returns:
        input_ids (with noisy completions), labels (with the completions), attention_mask, completion (the tokens whose
        prediction is trained): (B, L);
        position_ids: (3, B, L);
        attention_targets: row (N,) and column (N,) of the query, the token before the predicted one, and the image
        tokens that it should attend to, (N, L) bool.
    """
    length = max(len(example.prompt) + len(example.completion) for example in examples)
    shape = (len(examples), length)
    ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, pad, dtype=np.int64)
    mask, completion = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, example in enumerate(examples):
        sequence = [*example.prompt, *example.noisy_completion]
        start, end = len(example.prompt), len(sequence)
        ids[row, :end] = sequence
        labels[row, start:end] = example.completion
        mask[row, :end] = 1
        completion[row, [i for i in range(start, end) if i - start not in example.untrained]] = True
        position_ids[:, row, :end] = positions(sequence, image_token, grid)
        image_columns = np.flatnonzero(np.asarray(example.prompt) == image_token).reshape(-1, grid * grid)
        for target in example.attention_targets:
            if target.position in example.untrained:
                continue
            is_target = np.zeros(length, dtype=bool)
            for image, tokens in target.tokens.items():
                is_target[image_columns[image][tokens]] = True
            rows.append(row)
            columns.append(start + target.position - 1)
            targets.append(is_target)
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "completion": completion,
        "position_ids": position_ids,
    }
    batch: dict[str, Any] = {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}
    batch["attention_targets"] = (
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(columns, dtype=torch.long, device=device),
        torch.from_numpy(np.stack(targets)).to(device)
        if targets
        else torch.zeros((0, length), dtype=torch.bool, device=device),
    )
    return batch
