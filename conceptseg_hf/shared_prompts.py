"""Prefix sharing: the VLM processes a prompt shared by several rows once, and the rows reuse its key-value cache.

Sampling several completions of one prompt, and training on them, repeats the prompt (with its images) in many rows.
Tokens and hidden states equal those of separate passes up to numerical error, and all operations are differentiable.
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

from .vlm_families import Vlm, get_family


@dataclass(frozen=True)
class SharedPrompts:
    """Mapping between the rows of a batch and its unique prompts.

    Attributes:
        length: Number of columns of the (left-padded) prompts.
        prompt_of_row: Index of the unique prompt of each of the B rows.
        row_of_prompt: Index of the first row of each unique prompt.
    """

    length: int
    prompt_of_row: list[int]
    row_of_prompt: list[int]


def find_shared_prompts(vlm: Vlm, inputs: Mapping[str, Tensor], length: int) -> SharedPrompts | None:
    """Find rows with identical prompts by comparing the first columns of the rows, and their images.

    Args:
        vlm: The VLM.
        inputs: The VLM's inputs (see `VlmFamily.model_inputs`), with left-padded prompts.
        length: Number of columns of the prompts.

    Returns:
        The shared prompts, or None if all prompts are different or there are images after the prompts.
    """
    if (inputs["input_ids"][:, length:] == vlm.config.image_token_id).any():
        return None
    patches = [row.pixels for row in get_family(vlm.config).images_of_rows(vlm.config, inputs)]
    prompts = [inputs[name][:, :length] for name in ("input_ids", "attention_mask")]

    def is_same(row: int, other: int) -> bool:
        pixels = inputs["pixel_values"]
        return all(torch.equal(tensor[row], tensor[other]) for tensor in prompts) and torch.equal(
            pixels[patches[row]], pixels[patches[other]]
        )

    row_of_prompt: list[int] = []
    prompt_of_row: list[int] = []
    for row in range(len(patches)):
        index = next((i for i, other in enumerate(row_of_prompt) if is_same(row, other)), len(row_of_prompt))
        if index == len(row_of_prompt):
            row_of_prompt.append(row)
        prompt_of_row.append(index)
    if len(row_of_prompt) == len(patches):
        return None
    return SharedPrompts(length, prompt_of_row, row_of_prompt)


@contextmanager
def share_prompts(vlm: Vlm, inputs: Mapping[str, Tensor], length: int) -> Iterator[None]:
    """Process each unique prompt once in forward passes of the VLM's base model over `inputs` within the context.

    With gradient checkpointing, which disables the key-value cache, only the images of each prompt are encoded once.

    Args:
        vlm: The VLM.
        inputs: Inputs of the base model: prompts followed by completions.
        length: Number of columns of the prompts; at least one column must follow.
    """
    shared = find_shared_prompts(vlm, inputs, length)
    if shared is None:
        yield
        return
    base = vlm.base_model
    checkpointing = base.training and any(
        getattr(module, "gradient_checkpointing", False) for module in base.modules()
    )
    shared_forward = _read_images_once if checkpointing else _read_prompts_once
    # Replacing `forward` instead of calling the model twice keeps a single call for the hooks of the base model.
    base.forward = functools.partial(shared_forward, vlm, base.forward, shared)
    try:
        yield
    finally:
        del base.forward


def _read_prompts_once(
    vlm: Vlm,
    forward: Callable[..., Any],
    shared: SharedPrompts,
    input_ids: Tensor,
    attention_mask: Tensor,
    **inputs: Any,
) -> BaseModelOutputWithPast:
    """Replace the base model's forward; return (B, L, C) `last_hidden_state` with copies of the prompts' states."""
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    output = _read_prompts(vlm, forward, inputs, shared)
    cache = output.past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=input_ids.device))
    positions = get_family(vlm.config).continue_positions(vlm, attention_mask, shared.prompt_of_row)
    continued = forward(
        input_ids=input_ids[:, shared.length :],
        attention_mask=attention_mask,
        position_ids=positions[..., shared.length :],
        past_key_values=cache,
        use_cache=True,
    )
    states = [output.last_hidden_state[shared.prompt_of_row], continued.last_hidden_state]
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, dim=1))


def _read_images_once(vlm: Vlm, forward: Callable[..., Any], shared: SharedPrompts, **inputs: Any) -> Any:
    """Replace the base model's forward and encode the images of each unique prompt once."""
    family = get_family(vlm.config)
    images = [row.images for row in family.images_of_rows(vlm.config, inputs)]
    first_images = [
        image for row in shared.row_of_prompt for image in range(images[row].start, images[row].stop)
    ]
    encoded = family.encode_images(vlm, family.select_images(inputs, first_images))
    counts = [images[row].stop - images[row].start for row in shared.row_of_prompt]
    starts = [sum(counts[:prompt]) for prompt in range(len(counts))]
    tokens = [
        encoded[starts[prompt] + image] for prompt in shared.prompt_of_row for image in range(counts[prompt])
    ]
    del inputs["pixel_values"]
    return forward(**inputs, **family.encoded_images(vlm, tokens))


def generate(vlm: Vlm, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """Call `vlm.generate`, processing each unique prompt once.

    Args:
        vlm: The VLM.
        inputs: The VLM's inputs: complete, left-padded prompts.
        **kwargs: Additional arguments of `generate`.

    Returns:
        The output of `vlm.generate`.
    """
    # The last column is excluded, since `generate` needs at least one token that is not in the cache.
    shared = find_shared_prompts(vlm, inputs, inputs["input_ids"].shape[1] - 1)
    if shared is None:
        return vlm.generate(**inputs, **kwargs)
    with torch.no_grad():
        cache = _read_prompts(vlm, vlm.base_model, inputs, shared).past_key_values
    cache.batch_select_indices(torch.tensor(shared.prompt_of_row, device=inputs["input_ids"].device))
    get_family(vlm.config).continue_positions(vlm, inputs["attention_mask"], shared.prompt_of_row)
    text_inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return vlm.generate(**text_inputs, past_key_values=cache, **kwargs)


def _read_prompts(
    vlm: Vlm, forward: Callable[..., Any], inputs: Mapping[str, Any], shared: SharedPrompts
) -> Any:
    """Run a forward pass over the unique prompts; return its output with hidden states and key-value cache."""
    family = get_family(vlm.config)
    prompts = family.select_rows(vlm.config, inputs, shared.row_of_prompt)
    for name in family.row_names:
        prompts[name] = prompts[name][:, : shared.length]
    family.reset(vlm)
    cache = DynamicCache(config=vlm.config.get_text_config())
    positions = family.prompt_positions(prompts["attention_mask"])
    return forward(**prompts, **positions, past_key_values=cache, use_cache=True)
