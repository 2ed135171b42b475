"""Select and reorder the completions of a generation batch for training."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trl_adapter import Batch, split_pixel_values_by_grid, unsplit_pixel_values_by_grid


def best_and_worst(values: Tensor, group_size: int, count: int) -> list[int]:
    """Return the indices of the rows with the largest and the smallest values in each group.

    Args:
        values: (B,) values of whole groups, one group after another.
        group_size: Number of rows of a group.
        count: Number of largest values, and of smallest values, per group; at most half of `group_size`.

    Returns:
        Indices in ascending order. Of equal values, the first is treated as larger.
    """
    order = values.view(-1, group_size).sort(dim=1, descending=True, stable=True).indices
    kept = torch.cat([order[:, :count], order[:, group_size - count :]], dim=1)
    return (
        (kept + group_size * torch.arange(len(kept), device=kept.device)[:, None])
        .flatten()
        .sort()[0]
        .tolist()
    )


def select_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return a batch with the given completions and their images."""
    size = len(batch["completion_ids"])
    split = split_pixel_values_by_grid(batch)
    return unsplit_pixel_values_by_grid({name: _select(value, rows, size) for name, value in split.items()})


def group_rows(batches: Sequence[Batch], key: Callable[[Batch, int], Hashable]) -> list[Batch]:
    """Reorder completions such that those of a prompt are adjacent, in batches of the same sizes.

    A batch that contains all completions of a prompt processes the prompt once.

    Args:
        batches: The batches of one generation.
        key: Function of a batch and a row that returns a key of the row's prompt.
    """
    split = [split_pixel_values_by_grid(batch) for batch in batches]
    places = [
        (number, row) for number, batch in enumerate(split) for row in range(len(batch["completion_ids"]))
    ]
    first_place: dict[Hashable, int] = {}
    for place, (number, row) in enumerate(places):
        first_place.setdefault(key(batches[number], row), place)
    places.sort(key=lambda place: first_place[key(batches[place[0]], place[1])])
    grouped = []
    for batch in split:
        size = len(batch["completion_ids"])
        chosen, places = places[:size], places[size:]
        columns = {name: _gather([part[name] for part in split], chosen, size) for name in batch}
        grouped.append(unsplit_pixel_values_by_grid(columns))
    return grouped


def _is_column(value: Any, size: int) -> bool:
    return (
        isinstance(value, (Tensor, list))
        and (not isinstance(value, Tensor) or value.ndim > 0)
        and len(value) == size
    )


def _select(value: Any, rows: Sequence[int], size: int) -> Any:
    if not _is_column(value, size):
        return value
    return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]


def _gather(parts: Sequence[Any], places: Sequence[tuple[int, int]], size: int) -> Any:
    if not _is_column(parts[0], size):
        return parts[0]
    values = [parts[number][row] for number, row in places]
    return torch.stack(values) if isinstance(parts[0], Tensor) else values
