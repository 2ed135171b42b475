"""Rows of a batch that share a prompt: the MLLM reads it once, and each row continues from its keys and values.

Sampling several completions of one prompt, and training on them, repeats the same prompt (with its images) in many
rows. Tokens and hidden states equal those of the plain path to numerical noise; everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from . import mllm


@dataclass(frozen=True)
class SharedPrompts:
    """Which rows share their prompt.

    Attributes:
        length: Columns of the (left-padded) prompts.
        prompt_of_row: The prompt of each of the B rows.
        row_of_prompt: The first row of each prompt.
    """

    length: int
    prompt_of_row: list[int]
    row_of_prompt: list[int]


def find_shared_prompts(
    vlm: PreTrainedModel, inputs: Mapping[str, Tensor], length: int
) -> SharedPrompts | None:
    """Compares the first columns of the rows, and their images.

    Args:
        vlm: The MLLM.
        inputs: The MLLM's inputs (see `mllm.model_inputs`), prompts padded on the left.
        length: Columns of the prompts.

    Returns:
        None if every row has a prompt of its own.
    """
    patches = [part for _, part in mllm.patches_of_rows(vlm.config, inputs)]
    columns = [inputs[name][:, :length] for name in ("input_ids", "attention_mask")]

    def same(row: int, other: int) -> bool:
        pixels = inputs["pixel_values"]
        return all(torch.equal(part[row], part[other]) for part in columns) and torch.equal(
            pixels[patches[row]], pixels[patches[other]]
        )

    first: list[int] = []
    prompt_of_row: list[int] = []
    for row in range(len(patches)):
        number = next((i for i, other in enumerate(first) if same(row, other)), len(first))
        if number == len(first):
            first.append(row)
        prompt_of_row.append(number)
    return None if len(first) == len(patches) else SharedPrompts(length, prompt_of_row, first)


def hidden_states(vlm: PreTrainedModel, inputs: Mapping[str, Tensor], shared: SharedPrompts) -> Tensor:
    """(B, L, C) last-layer, post-norm hidden states; as `mllm.last_hidden_states`, each prompt read once.

    Args:
        vlm: The MLLM.
        inputs: Its inputs: prompts, and what follows them in the columns from `shared.length` on (at least one).
        shared: What `find_shared_prompts` says of them.
    """
    output = _read_prompts(vlm, inputs, shared)
    cache = output.past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=inputs["input_ids"].device))
    attention_mask = inputs["attention_mask"]
    positions = mllm.continue_positions(vlm, attention_mask, shared.prompt_of_row)
    continued = vlm.base_model(
        input_ids=inputs["input_ids"][:, shared.length :],
        attention_mask=attention_mask,
        position_ids=positions[..., shared.length :],
        past_key_values=cache,
        use_cache=True,
    )
    mllm.forget_positions(vlm)
    return torch.cat([output.last_hidden_state[shared.prompt_of_row], continued.last_hidden_state], dim=1)


def generate(vlm: PreTrainedModel, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """`vlm.generate`, with each prompt read once.

    Args:
        vlm: The MLLM.
        inputs: Its inputs: whole prompts, padded on the left.
        **kwargs: Further arguments of `generate`.

    Returns:
        What `generate` returns.
    """
    # The last column is left to `generate`, which needs a token to begin with.
    shared = find_shared_prompts(vlm, inputs, inputs["input_ids"].shape[1] - 1)
    if shared is None:
        return vlm.generate(**inputs, **kwargs)
    with torch.no_grad():
        cache = _read_prompts(vlm, inputs, shared).past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=inputs["input_ids"].device))
    mllm.continue_positions(vlm, inputs["attention_mask"], shared.prompt_of_row)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return vlm.generate(**rest, past_key_values=cache, **kwargs)


def _read_prompts(vlm: PreTrainedModel, inputs: Mapping[str, Tensor], shared: SharedPrompts) -> Any:
    """The forward pass over the different prompts: their hidden states, and their keys and values."""
    prompts = mllm.select_rows(vlm.config, inputs, shared.row_of_prompt)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        prompts[name] = prompts[name][:, : shared.length]
    mllm.forget_positions(vlm)
    cache = DynamicCache(config=vlm.config.get_text_config())
    return vlm.base_model(**prompts, past_key_values=cache, use_cache=True)
