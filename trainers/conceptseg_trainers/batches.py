"""Which completions of a generation batch are trained on, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trl_adapter import Batch, split_pixel_values_by_grid, unsplit_pixel_values_by_grid


def best_and_worst(values: Tensor, group_size: int, count: int) -> list[int]:
    """Rows with the largest and the smallest values of each group.

    Args:
        values: (B,) of whole groups, group after group.
        group_size: Rows of a group.
        count: How many of the largest, and as many of the smallest; at most half a group.

    Returns:
        Their indices in ascending order. Of equal values the first ones count as larger.
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
    """A batch of some completions; their images come along."""
    size = len(batch["completion_ids"])
    split = split_pixel_values_by_grid(batch)
    return unsplit_pixel_values_by_grid({name: _select(value, rows, size) for name, value in split.items()})


def group_rows(batches: Sequence[Batch], key: Callable[[Batch, int], Hashable]) -> list[Batch]:
    """The same completions, those of one prompt side by side, in batches of the same sizes.

    A batch that holds all completions of a prompt reads the prompt once.

    Args:
        batches: The batches of one generation.
        key: The prompt of a row.
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
