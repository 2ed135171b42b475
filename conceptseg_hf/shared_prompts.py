"""Rows of a batch that share a prompt: the VLM reads it once, and each row continues from its keys and values.

Sampling several completions of one prompt, and training on them, repeats the same prompt (with its images) in many
rows. Tokens and hidden states equal those of the plain path to numerical noise; everything is differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import vlm_backbone


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
    vlm: vlm_backbone.Vlm, inputs: Mapping[str, Tensor], length: int
) -> SharedPrompts | None:
    """Compares the first columns of the rows, and their images.

    Args:
        vlm: The VLM.
        inputs: The VLM's inputs (see `vlm_backbone.model_inputs`), prompts padded on the left.
        length: Columns of the prompts.

    Returns:
        None if every row has a prompt of its own, or images follow in later columns.
    """
    if inputs["mm_token_type_ids"][:, length:].any():
        return None
    patches = [part for _, part in vlm_backbone.patches_of_rows(vlm.config, inputs)]
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


@contextmanager
def share_prompts(vlm: vlm_backbone.Vlm, inputs: Mapping[str, Tensor], length: int) -> Iterator[None]:
    """While it holds, passes of the VLM's base model over `inputs` read each of their prompts once.

    With gradient checkpointing, which keeps no keys and values, only the images of a prompt are read once.

    Args:
        vlm: The VLM.
        inputs: What the base model is going to be called with: prompts, and what follows them.
        length: Columns of the prompts; at least one follows.
    """
    shared = find_shared_prompts(vlm, inputs, length)
    if shared is None:
        yield
        return
    base = vlm.base_model
    checkpointing = base.training and any(
        getattr(module, "gradient_checkpointing", False) for module in base.modules()
    )
    read = _read_images_once if checkpointing else _read_prompts_once
    whole = base.forward
    # Hooks of the base model see one call, whatever it is made of.
    base.forward = functools.partial(read, vlm, whole, shared)
    try:
        yield
    finally:
        del base.forward


def _read_prompts_once(
    vlm: vlm_backbone.Vlm,
    forward: Callable[..., Any],
    shared: SharedPrompts,
    input_ids: Tensor,
    attention_mask: Tensor,
    **inputs: Any,
) -> BaseModelOutputWithPast:
    """In the place of the base model's forward: (B, L, C) `last_hidden_state`, of which the prompts' are copies."""
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    output = _read_prompts(vlm, forward, inputs, shared)
    cache = output.past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=input_ids.device))
    positions = vlm_backbone.continue_positions(vlm, attention_mask, shared.prompt_of_row)
    continued = forward(
        input_ids=input_ids[:, shared.length :],
        attention_mask=attention_mask,
        position_ids=positions[..., shared.length :],
        past_key_values=cache,
        use_cache=True,
    )
    states = [output.last_hidden_state[shared.prompt_of_row], continued.last_hidden_state]
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, dim=1))


def _read_images_once(
    vlm: vlm_backbone.Vlm, forward: Callable[..., Any], shared: SharedPrompts, **inputs: Any
) -> Any:
    """In the place of the base model's forward, with the images of each prompt encoded once."""
    images = [images for images, _ in vlm_backbone.patches_of_rows(vlm.config, inputs)]
    prompts = vlm_backbone.select_rows(vlm.config, inputs, shared.row_of_prompt)
    encoded = vlm_backbone.encode_images(vlm, prompts["pixel_values"], prompts["image_grid_thw"])
    counts = [images[row].stop - images[row].start for row in shared.row_of_prompt]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    tokens = [
        encoded[starts[number] + image] for number in shared.prompt_of_row for image in range(counts[number])
    ]
    del inputs["pixel_values"]
    return forward(**inputs, **vlm_backbone.encoded_images(tokens))


def generate(vlm: vlm_backbone.Vlm, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """`vlm.generate`, with each prompt read once.

    Args:
        vlm: The VLM.
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
        cache = _read_prompts(vlm, vlm.base_model, inputs, shared).past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=inputs["input_ids"].device))
    vlm_backbone.continue_positions(vlm, inputs["attention_mask"], shared.prompt_of_row)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return vlm.generate(**rest, past_key_values=cache, **kwargs)


def _read_prompts(
    vlm: vlm_backbone.Vlm, forward: Callable[..., Any], inputs: Mapping[str, Any], shared: SharedPrompts
) -> Any:
    """A forward pass over the different prompts: their hidden states, and their keys and values."""
    prompts = vlm_backbone.select_rows(vlm.config, inputs, shared.row_of_prompt)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        prompts[name] = prompts[name][:, : shared.length]
    vlm_backbone.reset_rope_deltas(vlm)
    cache = DynamicCache(config=vlm.config.get_text_config())
    return forward(**prompts, past_key_values=cache, use_cache=True)
