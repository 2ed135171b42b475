"""Collation of the VLM's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .inputs import PreparedSample, known


def pad_batch(
    samples: Sequence[PreparedSample],
    completions: Sequence[Sequence[int]] | None,
    pad_token_id: int,
    end_of_turn: bool | Sequence[bool] = False,
) -> dict[str, torch.Tensor]:
    """Collate left-padded prompts and right-padded completions into a batch.

    Args:
        samples: Samples with the VLM's tensors.
        completions: Token ids of one completion per sample, including the end-of-turn token; None for prompts only.
        pad_token_id: Id of the padding token.
        end_of_turn: See `ConceptSegProcessor.collate`.

    Returns:
        See `ConceptSegProcessor.collate`.

    Raises:
        ValueError: If there are no samples, a sample has an error, or the numbers of samples and completions differ.
    """
    if not samples:
        raise ValueError("collate: samples is empty; pass at least one sample.")
    for index, sample in enumerate(samples):
        if sample.error is not None:
            raise ValueError(f"collate: sample {index} could not be prepared ({sample.error}); remove it.")
    if completions is not None and len(completions) != len(samples):
        raise ValueError(
            f"collate: got {len(completions)} completions for {len(samples)} samples; pass one per sample."
        )
    completion_ids = [[]] * len(samples) if completions is None else completions
    with_end = [end_of_turn] * len(samples) if isinstance(end_of_turn, bool) else end_of_turn
    prompts = [known(sample.input_ids, "input_ids") for sample in samples]
    prompt_length = max(map(len, prompts))
    length = prompt_length + max(map(len, completion_ids))
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.long)
    attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (sample, prompt_ids, ids, includes_end) in enumerate(
        zip(samples, prompts, completion_ids, with_end, strict=True)
    ):
        prompt, end = slice(prompt_length - len(prompt_ids), prompt_length), prompt_length + len(ids)
        input_ids[row, prompt] = prompt_ids.cpu()
        token_types[row, prompt] = known(sample.mm_token_type_ids, "mm_token_type_ids").cpu()
        input_ids[row, prompt_length:end] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, prompt.start : end] = 1
        completion_mask[row, prompt_length : max(end - (not includes_end), prompt_length)] = True
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": token_types,
        "pixel_values": torch.cat([known(sample.pixel_values, "pixel_values") for sample in samples]),
    }
    if any(sample.image_grid_thw is not None for sample in samples):
        batch["image_grid_thw"] = torch.cat(
            [known(sample.image_grid_thw, "image_grid_thw") for sample in samples]
        )
    if completions is not None:
        batch["completion_mask"] = completion_mask
    return batch
