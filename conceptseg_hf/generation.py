"""Generation with the VLM that also returns the hidden states of the generated tokens."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from .devices import has_hooks, loaded, move_to_hooks
from .hashing import weights
from .shared_references import ReferenceStore, read_references
from .vlm_families import Vlm, get_family

MAX_NEW_TOKENS = 768  # Table 7
_NO_TOKEN = -1  # not a valid token id

# Position offsets and hooks are stored on the VLM, so only one thread at a time may generate with it.
_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class GeneratedCompletions:
    """Completions of a batch of prompts.

    Attributes:
        token_ids: (B, T) token ids, padded on the right; tokens that were given are padded on the left.
        mask: (B, T) bool, true at completion tokens, excluding end-of-sequence tokens.
        hidden_states: (B, T, C) last-layer, post-norm hidden states; zero where `state_mask` is false.
        state_mask: (B, T) bool, true at tokens with a hidden state: those of `mask`, and with `end_of_turn_state` the
            end-of-sequence token of each completion. Defaults to `mask`.
    """

    token_ids: Tensor
    mask: Tensor
    hidden_states: Tensor
    state_mask: Tensor = None  # type: ignore[assignment]  # defaults to `mask`

    def __post_init__(self) -> None:
        if self.state_mask is None:
            object.__setattr__(self, "state_mask", self.mask)


@torch.no_grad()
def generate_with_states(
    vlm: Vlm,
    inputs: Mapping[str, Any],
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    hidden_states_at: str = "token",
    end_of_turn_state: bool = False,
    max_total_length: int | None = None,
    num_given: Sequence[int] | None = None,
    references: ReferenceStore | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
) -> GeneratedCompletions:
    """Generate completions and record the hidden state of each completion token in the same pass.

    With `hidden_states_at="token"`, the state of a token is computed when the token is the input, one decoding step
    after it was generated. Generation therefore runs one step beyond `max_new_tokens`, and the token of that step is
    discarded. The states equal those of a teacher-forced pass over prompt and completion up to numerical error. Threads
    that share a model are serialized by a lock.

    Args:
        vlm: The VLM.
        inputs: Left-padded batch from the processor's `collate`.
        generation_config: A `GenerationConfig`, or a mapping of its fields. Unset fields default to the VLM's
            `generation_config`, except that decoding is greedy and limited to 768 tokens by default.
        hidden_states_at: `"token"`, or `"predict"` for the state that predicts the token.
        end_of_turn_state: Also record the state of the end-of-sequence token of each completion. Each row then runs one
            step longer, in which this token is the input.
        max_total_length: Maximum number of tokens of a prompt (without padding) and its completion together; used if
            `generation_config` sets no limit.
        num_given: Number of tokens at the end of each prompt that are the start of its completion. They and their
            states are part of the returned completions, but do not count for `max_new_tokens`.
        references: Key-value pairs of references. If given, references that several prompts share are read once, except
            for models with Accelerate's hooks, several completions per prompt, chunked prefill and other caches.
        on_tokens: Called after each step with the (B, T) tokens generated so far, without given ones, and their (B, T)
            mask as in `GeneratedCompletions`. An exception that it raises ends the generation.

    Returns:
        Completions with T the length of the longest one (at least 1), including its end-of-sequence token if that has a
        state. Image tokens are never generated.

    Raises:
        ValueError: If the generation config has an unknown field or an unsupported value, or the inputs are incomplete.
        RuntimeError: If the VLM was compiled such that hidden states cannot be recorded.
    """
    family = get_family(vlm.config)
    inputs = move_to_hooks(family.model_inputs(inputs), vlm)
    config, limits = prepare_generation_config(vlm, generation_config, inputs, max_total_length)
    limit = config.max_new_tokens
    at_token = hidden_states_at == "token"
    config.max_new_tokens = limit + int(at_token)
    hooked = has_hooks(vlm)
    if hooked or not _uses_plain_cache(config):
        references = None
    with _locks.setdefault(vlm, threading.Lock()):
        shared = None if references is None else read_references(vlm, inputs, references)
        prompts = inputs if shared is None else shared
        prompt_length = prompts["input_ids"].shape[1]
        recorder = StateRecorder(max(num_given or [0]))
        criteria: list[StoppingCriteria] = [recorder]
        if on_tokens is not None:
            criteria.append(_TokenReporter(prompt_length, config.eos_token_id, limits, limit, on_tokens))
        # The state of a token is computed in the step that follows it, so rows must end one step later.
        delayed_eos = (
            _DelayedEosCriteria(config.eos_token_id, prompt_length)
            if end_of_turn_state and at_token
            else None
        )
        if delayed_eos is not None:
            # Overrides the end-of-sequence criterion of `generate` and never stops a row.
            never = EosTokenCriteria(torch.tensor([_NO_TOKEN], device=inputs["input_ids"].device))
            criteria += [delayed_eos, never]
        head = vlm.get_output_embeddings()
        suppressed = torch.tensor(config.suppress_tokens, device=inputs["input_ids"].device)
        handles = [
            head.register_forward_pre_hook(recorder.record),
            head.register_forward_hook(partial(_suppress, suppressed)),
        ]
        config.suppress_tokens = None
        if recorder.num_given:
            handles.append(vlm.base_model.register_forward_hook(recorder.record_prompt))
        try:
            with (
                loaded(vlm),
                _inference_mode(vlm, hooked),
                _without_device_warning(vlm),
                _without_criteria_warning(delayed_eos is not None),
            ):  # `loaded` is needed since generate calls modules of the VLM without its forward
                sequences = vlm.generate(
                    **prompts, generation_config=config, stopping_criteria=StoppingCriteriaList(criteria)
                )
        finally:
            for handle in handles:
                handle.remove()
            family.reset(vlm)

    # The input of step t is token t - 1, and it predicts token t. If all rows end with their first token, no token has
    # been an input. On some devices, `generate` discards tokens past the end, so there may be more states than tokens.
    states = recorder.stacked(hidden_states_at)
    token_ids = sequences[:, prompt_length:].clone()  # a copy outside of inference mode
    within_limit = _within(limits, len(token_ids), min(limit, states.shape[1])).to(token_ids.device)
    mask = _before_end(token_ids, config.eos_token_id)[:, : within_limit.shape[1]] & within_limit
    state_mask = mask
    if end_of_turn_state:
        state_mask = (
            _before_end(token_ids, config.eos_token_id, up_to=True)[:, : within_limit.shape[1]] & within_limit
        )
    length = max(1, int(state_mask.sum(1).max()))
    mask, state_mask = mask[:, :length], state_mask[:, :length]
    states = states[:, :length].to(mask.device)
    generated = GeneratedCompletions(
        token_ids[:, :length], mask, states.masked_fill(~state_mask[..., None], 0), state_mask
    )
    if not recorder.num_given:
        return generated
    rows = len(token_ids) // len(prompts["input_ids"])
    return _prepend_given(
        prompts["input_ids"].repeat_interleave(rows, dim=0),
        torch.tensor(num_given, device=mask.device).repeat_interleave(rows),
        recorder.given_states(hidden_states_at).to(mask.device),
        generated,
    )


def _prepend_given(
    prompts: Tensor, num_given: Tensor, states: Tensor, generated: GeneratedCompletions
) -> GeneratedCompletions:
    """Prepend the given tokens, which are the last ones of the prompts, and their states to generated tokens."""
    width = states.shape[1]
    given = torch.arange(width, device=num_given.device) >= width - num_given[:, None]
    return GeneratedCompletions(
        torch.cat([prompts[:, -width:], generated.token_ids], dim=1),
        torch.cat([given, generated.mask], dim=1),
        torch.cat([states.masked_fill(~given[..., None], 0), generated.hidden_states], dim=1),
        torch.cat([given, generated.state_mask], dim=1),
    )


def _uses_plain_cache(config: GenerationConfig) -> bool:
    """Whether generation has one row per prompt and can continue a `DynamicCache`."""
    return (
        (config.num_return_sequences or 1) == 1
        and config.use_cache is not False
        and not config.cache_implementation
        and not config.prefill_chunk_size
    )


def _inference_mode(vlm: Vlm, hooked: bool) -> AbstractContextManager[None]:
    """Return PyTorch's inference mode, which makes each small operation cheaper, where it is safe.

    It is not where hooks of Accelerate, ZeRO-3 or FSDP write weights during the forward pass, which could then not be
    trained, and not for weights that are subclasses of tensors (quantized or distributed), whose views may fail in it.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if hooked or is_distributed or any(type(weight) not in (Tensor, nn.Parameter) for weight in weights(vlm)):
        return nullcontext()
    return torch.inference_mode()


@contextmanager
def _without_device_warning(vlm: Vlm) -> Iterator[None]:
    """Suppress the device warning of `generate` if the first parameter is offloaded and on the meta device."""
    with warnings.catch_warnings():
        if vlm.device.type == "meta":
            warnings.filterwarnings(
                "ignore", r"You are calling \.generate\(\) with the `input_ids`", UserWarning
            )
        yield


@contextmanager
def _without_criteria_warning(enabled: bool) -> Iterator[None]:
    """Suppress the warning of `generate` that a custom criterion overrides one of its own, which is intended."""
    logger = logging.getLogger("transformers.generation.utils")

    def is_unrelated(record: logging.LogRecord) -> bool:
        return "A custom stopping criteria of type" not in record.getMessage()

    if enabled:
        logger.addFilter(is_unrelated)
    try:
        yield
    finally:
        logger.removeFilter(is_unrelated)


def prepare_generation_config(
    vlm: Vlm,
    overrides: GenerationConfig | Mapping[str, Any] | None,
    inputs: Mapping[str, Tensor],
    max_total_length: int | None,
) -> tuple[GenerationConfig, Tensor | None]:
    """Return a copy of the generation config with all required values set, and (B,) length limits of the rows.

    Args:
        vlm: The VLM.
        overrides: See `generate_with_states`.
        inputs: The collated prompts.
        max_total_length: See `generate_with_states`.
    """
    prompt_length = inputs["input_ids"].shape[1]
    limits = None
    if isinstance(overrides, GenerationConfig):
        config = copy.deepcopy(overrides)
    else:
        config = GenerationConfig()
        for name, value in (overrides or {}).items():
            if not hasattr(config, name):
                raise ValueError(
                    f"generation_config: unknown field {name!r}; use a field of transformers.GenerationConfig."
                )
            setattr(config, name, value)
    defaults = vlm.generation_config
    text_config = vlm.config.get_text_config()
    _check_config(config, defaults)
    if config.max_new_tokens is None and config.max_length is None and max_total_length is not None:
        prompt_lengths = inputs["attention_mask"].sum(dim=1)
        limits = max_total_length - prompt_lengths
        if int(limits.min()) < 1:
            raise ValueError(
                f"generate_with_states: max_total_length is {max_total_length}, but a prompt has "
                f"{int(prompt_lengths.max())} tokens; raise it, or set max_new_tokens instead."
            )
        config.max_new_tokens = int(limits.max())
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
    config.eos_token_id = _first_set(config.eos_token_id, defaults.eos_token_id, text_config.eos_token_id)
    eos_ids = _as_list(config.eos_token_id)
    config.pad_token_id = _first_set(
        config.pad_token_id, defaults.pad_token_id, text_config.pad_token_id, *eos_ids[:1], 0
    )
    config.suppress_tokens = sorted(
        {
            *get_family(vlm.config).vision_token_ids(vlm.config),
            *(_first_set(config.suppress_tokens, defaults.suppress_tokens) or []),
        }
    )
    config.return_dict_in_generate = False
    if config.compile_config is None:
        # With a static cache on an accelerator, `generate` would compile the VLM as a whole and hide its hidden states.
        config.disable_compile = True
    config.do_sample = bool(config.do_sample)
    if not config.do_sample:  # avoid warnings about unused sampling settings of the VLM
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    return config, limits


def _check_config(config: GenerationConfig, defaults: GenerationConfig) -> None:
    """Raise an error for unsupported settings; `defaults` provides the values that `config` does not set."""

    def setting(name: str) -> Any:
        return _first_set(getattr(config, name), getattr(defaults, name))

    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ValueError(f"generate_with_states: {name} is {value!r}; use an integer of at least 1.")
    if (
        (setting("num_beams") or 1) > 1
        or setting("prompt_lookup_num_tokens")
        or setting("assistant_early_exit")
    ):
        raise ValueError(
            "generate_with_states: beam search and assisted decoding are not supported with hidden states; "
            "use greedy decoding or sampling."
        )
    if (setting("guidance_scale") or 1) != 1:
        raise ValueError(
            f"generate_with_states: guidance_scale is {setting('guidance_scale')}, but classifier-free guidance is not "
            "supported for prompts with images; omit it."
        )
    if setting("stop_strings"):
        raise ValueError(
            f"generate_with_states: stop_strings is {setting('stop_strings')!r}, but stop strings are not supported; "
            "pass the ids of the stop tokens as eos_token_id."
        )


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _before_end(token_ids: Tensor, eos_token_id: int | list[int] | None, up_to: bool = False) -> Tensor:
    """Return (B, T) bool, true before the first end-of-sequence token of each row; with `up_to` also at that token."""
    ends = _is_end(token_ids, eos_token_id)
    return ends.cumsum(1) - ends.long() * up_to == 0


def _is_end(token_ids: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    ids = torch.tensor(_as_list(eos_token_id), dtype=token_ids.dtype, device=token_ids.device)
    return torch.isin(token_ids, ids)


def _within(limits: Tensor | None, rows: int, length: int) -> Tensor:
    """Return (B, length) bool, true at tokens within the limit of their row; a prompt may have several rows."""
    if limits is None:
        return torch.ones(rows, length, dtype=torch.bool)
    limits = limits.repeat_interleave(rows // len(limits))
    return torch.arange(length, device=limits.device) < limits[:, None]


class _DelayedEosCriteria(StoppingCriteria):
    """Stop a row one step after its end-of-sequence token, so that the state of this token is computed.

    Args:
        eos_token_id: Ids of the end-of-sequence tokens.
        prompt_length: Length of the prompts, in which end-of-sequence tokens are ignored.
    """

    def __init__(self, eos_token_id: int | list[int] | None, prompt_length: int) -> None:
        self._eos_token_id, self._prompt_length = eos_token_id, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return true for rows that generated an end-of-sequence token before the last step."""
        return _is_end(input_ids[:, self._prompt_length : -1], self._eos_token_id).any(dim=1)


class _TokenReporter(StoppingCriteria):
    """Report the tokens of the completions after each step; never stops a row."""

    def __init__(
        self,
        prompt_length: int,
        eos_token_id: int | list[int] | None,
        limits: Tensor | None,
        limit: int,
        on_tokens: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._prompt_length, self._eos_token_id = prompt_length, eos_token_id
        self._limits, self._limit, self._on_tokens = limits, limit, on_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Call `on_tokens`; return false for all rows."""
        token_ids = input_ids[:, self._prompt_length :][:, : self._limit]
        within_limit = _within(self._limits, *token_ids.shape).to(token_ids.device)
        self._on_tokens(token_ids, _before_end(token_ids, self._eos_token_id) & within_limit)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _suppress(token_ids: Tensor, head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
    """Forward hook of the language-model head: set the logits of tokens to minus infinity.

    The processor that `generate` adds for `suppress_tokens` searches the whole vocabulary in each step.
    """
    logits.index_fill_(-1, token_ids.to(logits.device), -torch.inf)


class StateRecorder(StoppingCriteria):
    """Record one (B, C) hidden state per step of `generate`; never stops a row.

    A hook on the language-model head receives the states of each forward pass, and `generate` calls its stopping
    criteria once per step. Forward passes that do not generate a token (chunked prefill, passes that only synchronize
    processes) are therefore not recorded. The head is not part of a compiled language model, so the hook neither causes
    a recompilation nor is skipped.

    Args:
        num_given: Number of columns at the end of the prompts whose states are also recorded.

    Attributes:
        states: The states that predicted the tokens, in the order of the steps.
    """

    def __init__(self, num_given: int = 0) -> None:
        self.num_given = num_given
        self.states: list[Tensor] = []
        self._last: Tensor | None = None
        self._prompt: Tensor | None = None

    def record(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the language-model head."""
        self._last = inputs[0][:, -1]

    def record_prompt(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """Forward hook of the base model: record the last states of the prompts, which may be read in chunks."""
        if not self.states:
            chunk = output[0][:, -self.num_given - 1 :]
            chunks = [chunk] if self._prompt is None else [self._prompt, chunk]
            self._prompt = torch.cat(chunks, dim=1)[:, -self.num_given - 1 :].clone()

    def given_states(self, hidden_states_at: str) -> Tensor:
        """Return the (B, num_given, C) states of the last tokens of the prompts."""
        assert self._prompt is not None  # the prompts have been read if a token was generated
        return self._prompt[:, 1:] if hidden_states_at == "token" else self._prompt[:, :-1]

    def stacked(self, hidden_states_at: str) -> Tensor:
        """Stack the states of the tokens to (B, S, C); the last token may have no state.

        Args:
            hidden_states_at: See `generate_with_states`.
        """
        states = self.states[int(hidden_states_at == "token") :]
        return torch.stack(states or [torch.zeros_like(self.states[0])], dim=1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Record the last hidden state; return false for all rows."""
        if self._last is None:
            raise RuntimeError(
                "generate_with_states: the VLM was compiled as a whole by an earlier call, and its graph hides the "
                "hidden states; call torch.compiler.reset() first, or compile only model.vlm.model.language_model."
            )
        self.states.append(self._last.clone())  # a view would keep the states of the whole prompt in memory
        self._last = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
