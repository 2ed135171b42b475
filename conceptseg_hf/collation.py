"""Batches of the VLM's inputs."""

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
    """Batches prompts, padded on the left, and completions, padded on the right.

    Args:
        samples: Samples with the VLM's tensors.
        completions: Token ids of a completion per sample, each with the end-of-turn token; None for prompts alone.
        pad_token_id: The token that is padded with.
        end_of_turn: See `ConceptSegProcessor.collate`.

    Returns:
        See `ConceptSegProcessor.collate`.

    Raises:
        ValueError: If there are no samples, one has an error, or the numbers differ.
    """
    if not samples:
        raise ValueError("collate: there are no samples; give at least one.")
    for index, sample in enumerate(samples):
        if sample.error is not None:
            raise ValueError(f"collate: sample {index} could not be prepared ({sample.error}); leave it out.")
    if completions is not None and len(completions) != len(samples):
        raise ValueError(
            f"collate: got {len(completions)} completions for {len(samples)} samples; give one each."
        )
    endings = [[]] * len(samples) if completions is None else completions
    with_end = [end_of_turn] * len(samples) if isinstance(end_of_turn, bool) else end_of_turn
    prompts = [known(sample.input_ids, "input_ids") for sample in samples]
    prompt_length = max(map(len, prompts))
    length = prompt_length + max(map(len, endings))
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.long)
    attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (sample, ids, ending, keeps_end) in enumerate(
        zip(samples, prompts, endings, with_end, strict=True)
    ):
        prompt, end = slice(prompt_length - len(ids), prompt_length), prompt_length + len(ending)
        input_ids[row, prompt] = ids.cpu()
        token_types[row, prompt] = known(sample.mm_token_type_ids, "mm_token_type_ids").cpu()
        input_ids[row, prompt_length:end] = torch.tensor(ending, dtype=torch.long)
        attention_mask[row, prompt.start : end] = 1
        completion_mask[row, prompt_length : max(end - (not keeps_end), prompt_length)] = True
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": token_types,
        "pixel_values": torch.cat([known(sample.pixel_values, "pixel_values") for sample in samples]),
        "image_grid_thw": torch.cat([known(sample.image_grid_thw, "image_grid_thw") for sample in samples]),
    }
    if completions is not None:
        batch["completion_mask"] = completion_mask
    return batch
