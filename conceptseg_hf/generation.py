"""One MLLM pass: the completion's tokens and their hidden states, taken while generating."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from . import mllm

MAX_NEW_TOKENS = 768  # Table 7

# An MLLM keeps positions, and the hook below its states, between the steps of a completion: threads take turns.
_turns: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class GeneratedCompletions:
    """Completions of a batch of prompts; end-of-sequence tokens and padding are excluded.

    Attributes:
        token_ids: (B, T) token ids, padded on the right.
        mask: (B, T) bool, true at the tokens of the completion.
        hidden_states: (B, T, C) their last-layer, post-norm hidden states; zero where `mask` is false.
    """

    token_ids: Tensor
    mask: Tensor
    hidden_states: Tensor


@torch.no_grad()
def generate_with_states(
    vlm: PreTrainedModel,
    inputs: Mapping[str, Any],
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    hidden_states_at: str = "token",
) -> GeneratedCompletions:
    """Generates completions and keeps the hidden state of every completion token, in one pass.

    The state of a token at the position where it is the input (`"token"`) appears one decoding step after the
    token itself; generation therefore runs one step beyond `max_new_tokens`, and that step's token is
    dropped. States equal those of a teacher-forced pass over prompt and completion to numerical noise. Threads
    that share a model take turns.

    Args:
        vlm: The MLLM.
        inputs: The left-padded batch of the processor's `collate`.
        generation_config: A `GenerationConfig`, or its fields as a mapping. What it leaves open is taken from
            the MLLM's own `generation_config`, except that decoding is greedy and at most 768 tokens long
            unless it says otherwise.
        hidden_states_at: `"token"`, or `"predict"` for the state that predicts the token.

    Returns:
        Completions with T the length of the longest (at least 1). Tokens that stand for images are never
        generated.

    Raises:
        ValueError: If beam search or assisted decoding is asked for, a field of the configuration does not exist, or
            the inputs are incomplete.
    """
    inputs = mllm.model_inputs(inputs)
    config = _prepare_config(vlm, generation_config, prompt_length=inputs["input_ids"].shape[1])
    limit = config.max_new_tokens
    at_token = hidden_states_at == "token"
    config.max_new_tokens = limit + int(at_token)
    with _turns.setdefault(vlm, threading.Lock()):
        with _last_states(mllm.final_norm(vlm)) as collected:
            sequences = vlm.generate(**inputs, generation_config=config)
        mllm.forget_positions(vlm)

    # Step t reads token t - 1 and predicts token t. Where every row ended with its first token, no token has
    # been read.
    states = torch.stack(collected[int(at_token) :] or [torch.zeros_like(collected[0])], dim=1)
    token_ids = sequences[:, inputs["input_ids"].shape[1] :]
    mask = _before_end(token_ids, config.eos_token_id)[:, : min(limit, states.shape[1])]
    length = max(1, int(mask.sum(1).max()))
    mask = mask[:, :length]
    states = states[:, :length].to(mask.device)
    return GeneratedCompletions(token_ids[:, :length], mask, states.masked_fill(~mask[..., None], 0))


def _prepare_config(
    vlm: PreTrainedModel, given: GenerationConfig | Mapping[str, Any] | None, prompt_length: int
) -> GenerationConfig:
    """A private copy with every value set that the one-pass scheme depends on."""
    if isinstance(given, GenerationConfig):
        config = copy.deepcopy(given)
    else:
        config = GenerationConfig()
        for name, value in (given or {}).items():
            if not hasattr(config, name):
                raise ValueError(
                    f"generation_config has no field {name!r}; see transformers.GenerationConfig for them."
                )
            setattr(config, name, value)
    own = vlm.generation_config
    text_config = vlm.config.get_text_config()

    def first_set(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    if first_set(config.num_beams, own.num_beams, 1) > 1 or config.prompt_lookup_num_tokens:
        raise ValueError(
            "generate_with_states: beam search and assisted decoding do not keep one hidden state per token; "
            "use greedy decoding or sampling."
        )
    if config.max_new_tokens is None:
        config.max_new_tokens = (
            MAX_NEW_TOKENS if config.max_length is None else config.max_length - prompt_length
        )
    if config.max_new_tokens < 1:
        raise ValueError(
            f"generate_with_states: max_length is {config.max_length}, but the prompt has {prompt_length} "
            "tokens; set max_new_tokens instead."
        )
    config.max_length = None
    config.eos_token_id = first_set(config.eos_token_id, own.eos_token_id, text_config.eos_token_id)
    eos_ids = _as_list(config.eos_token_id)
    config.pad_token_id = first_set(
        config.pad_token_id, own.pad_token_id, text_config.pad_token_id, *eos_ids[:1], 0
    )
    config.suppress_tokens = sorted(
        {*mllm.vision_token_ids(vlm.config), *(first_set(config.suppress_tokens, own.suppress_tokens) or [])}
    )
    config.return_dict_in_generate = False
    config.do_sample = bool(config.do_sample)
    if not config.do_sample:  # sampling fields of the MLLM's own file would only cause warnings
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    return config


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _before_end(token_ids: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    """(B, T) bool: true before the row's first end-of-sequence token."""
    ends = torch.isin(
        token_ids, torch.tensor(_as_list(eos_token_id), dtype=token_ids.dtype, device=token_ids.device)
    )
    return ends.cumsum(1) == 0


@contextmanager
def _last_states(norm: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the (B, C) output of `norm` at the last position of every forward pass."""
    states: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: states.append(output[:, -1].clone()))
    try:
        yield states
    finally:
        handle.remove()
