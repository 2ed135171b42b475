"""Arguments and hidden states of forward passes over given completions."""

from __future__ import annotations

import torch
from torch import Tensor

from .sam_prompt import ImageFeatures


def check_forward_arguments(
    completion_mask: Tensor | None,
    sam_pixel_values: Tensor | None,
    sam_features: ImageFeatures | None,
    sam_input_ids: Tensor | None,
    sam_attention_mask: Tensor | None,
    mask_labels: Tensor | None,
) -> Tensor:
    """Return `completion_mask`; raise a ValueError if arguments of the model's `forward` are incompatible."""
    if completion_mask is None:
        raise ValueError("forward: completion_mask is missing; pass the output of the processor's `collate`.")
    if sam_pixel_values is not None and sam_features is not None:
        raise ValueError("forward: both sam_pixel_values and sam_features are given; pass only one of them.")
    if mask_labels is not None and sam_pixel_values is None and sam_features is None:
        raise ValueError(
            "forward: mask_labels require an image to segment; also pass sam_pixel_values or sam_features."
        )
    if (sam_input_ids is None) != (sam_attention_mask is None):
        raise ValueError(
            "forward: only one of sam_input_ids and sam_attention_mask is given; pass both or neither."
        )
    return completion_mask


def completion_states(
    hidden_states: Tensor, completion_mask: Tensor, hidden_states_at: str
) -> tuple[Tensor, Tensor]:
    """Return the columns from the first to the last completion token (at least one), and their mask."""
    mask = completion_mask.bool().to(hidden_states.device)
    if hidden_states_at == "predict":  # the hidden state of the previous token predicts a token
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    columns = mask.any(dim=0).nonzero()
    first, last = (int(columns[0]), int(columns[-1])) if len(columns) else (0, 0)
    return hidden_states[:, first : last + 1], mask[:, first : last + 1]
