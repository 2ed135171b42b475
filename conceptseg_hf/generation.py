"""One VLM pass: the completion's tokens and their hidden states, taken while generating."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from . import vlm_backbone
from .devices import loaded, move_to_hooks

MAX_NEW_TOKENS = 768  # Table 7
_NO_TOKEN = -1  # the id of none

# A VLM keeps positions between the steps of a completion, and calls the hooks of all threads: they take turns.
_turns: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class GeneratedCompletions:
    """Completions of a batch of prompts.

    Attributes:
        token_ids: (B, T) token ids, padded on the right.
        mask: (B, T) bool, true at the tokens of the completion; end-of-sequence tokens are none.
        hidden_states: (B, T, C) last-layer, post-norm hidden states; zero where `state_mask` is false.
        state_mask: (B, T) bool, true where there is a state: as `mask`, and at the end-of-sequence token of each
            completion if that was asked for. `mask` by default.
    """

    token_ids: Tensor
    mask: Tensor
    hidden_states: Tensor
    state_mask: Tensor = None  # type: ignore[assignment]  # as `mask` by default

    def __post_init__(self) -> None:
        if self.state_mask is None:
            object.__setattr__(self, "state_mask", self.mask)


@torch.no_grad()
def generate_with_states(
    vlm: vlm_backbone.Vlm,
    inputs: Mapping[str, Any],
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    hidden_states_at: str = "token",
    end_of_turn_state: bool = False,
    max_total_length: int | None = None,
) -> GeneratedCompletions:
    """Generates completions and keeps the hidden state of every completion token, in one pass.

    The state of a token at the position where it is the input (`"token"`) appears one decoding step after the
    token itself; generation therefore runs one step beyond `max_new_tokens`, and that step's token is
    dropped. States equal those of a teacher-forced pass over prompt and completion to numerical noise. Threads
    that share a model take turns.

    Args:
        vlm: The VLM.
        inputs: The left-padded batch of the processor's `collate`.
        generation_config: A `GenerationConfig`, or its fields as a mapping. What it leaves open is taken from
            the VLM's own `generation_config`, except that decoding is greedy and at most 768 tokens long
            unless it says otherwise.
        hidden_states_at: `"token"`, or `"predict"` for the state that predicts the token.
        end_of_turn_state: Also keep the state of the end-of-sequence token of each completion that has one. A row
            then goes on for one step after it, in which the token is read.
        max_total_length: Most tokens of a prompt (without padding) and its completion together, where
            `generation_config` limits neither.

    Returns:
        Completions with T the length of the longest (at least 1), its end-of-sequence token included if that has a
        state. Tokens that stand for images are never generated.

    Raises:
        ValueError: If the configuration has a field that does not exist or cannot be used here, or the inputs are
            incomplete.
        RuntimeError: If the VLM is compiled in such a way that its states cannot be seen.
    """
    inputs = move_to_hooks(vlm_backbone.model_inputs(inputs), vlm)
    config, limits = _prepare_config(vlm, generation_config, inputs, max_total_length)
    limit = config.max_new_tokens
    at_token = hidden_states_at == "token"
    config.max_new_tokens = limit + int(at_token)
    prompt_length = inputs["input_ids"].shape[1]
    with _turns.setdefault(vlm, threading.Lock()):
        recorder = StateRecorder()
        criteria: list[StoppingCriteria] = [recorder]
        # The state of a token that is read stands in the next step: rows end one step later.
        late = _LateEnd(config.eos_token_id, prompt_length) if end_of_turn_state and at_token else None
        if late is not None:
            criteria += [late, EosTokenCriteria(torch.tensor([_NO_TOKEN], device=inputs["input_ids"].device))]
        handle = vlm.get_output_embeddings().register_forward_pre_hook(recorder.record)
        try:
            with (
                loaded(vlm),
                _without_device_warning(vlm),
                _without_criteria_warning(late is not None),
            ):  # generate calls parts of the VLM past its forward
                sequences = vlm.generate(
                    **inputs, generation_config=config, stopping_criteria=StoppingCriteriaList(criteria)
                )
        finally:
            handle.remove()
            vlm_backbone.reset_rope_deltas(vlm)

    # Step t reads token t - 1 and predicts token t. Where every row ended with its first token, no token has
    # been read. Tokens past the end, which generate takes back on some devices, leave states behind theirs.
    states = recorder.stacked(hidden_states_at)
    token_ids = sequences[:, prompt_length:]
    in_reach = _within(limits, len(token_ids), min(limit, states.shape[1])).to(token_ids.device)
    mask = _before_end(token_ids, config.eos_token_id)[:, : in_reach.shape[1]] & in_reach
    state_mask = mask
    if end_of_turn_state:
        state_mask = (
            _before_end(token_ids, config.eos_token_id, up_to=True)[:, : in_reach.shape[1]] & in_reach
        )
    length = max(1, int(state_mask.sum(1).max()))
    mask, state_mask = mask[:, :length], state_mask[:, :length]
    states = states[:, :length].to(mask.device)
    return GeneratedCompletions(
        token_ids[:, :length], mask, states.masked_fill(~state_mask[..., None], 0), state_mask
    )


@contextmanager
def _without_device_warning(vlm: vlm_backbone.Vlm) -> Iterator[None]:
    """Hides that `generate` asks for inputs on the device of the first parameter, which may be offloaded to nowhere."""
    with warnings.catch_warnings():
        if vlm.device.type == "meta":
            warnings.filterwarnings(
                "ignore", r"You are calling \.generate\(\) with the `input_ids`", UserWarning
            )
        yield


@contextmanager
def _without_criteria_warning(is_wanted: bool) -> Iterator[None]:
    """Hides that `generate` is given a criterion of a kind that it makes itself: it is meant to take its place."""
    logger = logging.getLogger("transformers.generation.utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "A custom stopping criteria of type" not in record.getMessage()

    if is_wanted:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _prepare_config(
    vlm: vlm_backbone.Vlm,
    given: GenerationConfig | Mapping[str, Any] | None,
    inputs: Mapping[str, Tensor],
    max_total_length: int | None,
) -> tuple[GenerationConfig, Tensor | None]:
    """A private copy with every value set that the one-pass scheme depends on, and (B,) limits of the rows."""
    prompt_length = inputs["input_ids"].shape[1]
    limits = None
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
    _check_config(config, own)
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
    config.eos_token_id = _first_set(config.eos_token_id, own.eos_token_id, text_config.eos_token_id)
    eos_ids = _as_list(config.eos_token_id)
    config.pad_token_id = _first_set(
        config.pad_token_id, own.pad_token_id, text_config.pad_token_id, *eos_ids[:1], 0
    )
    config.suppress_tokens = sorted(
        {
            *vlm_backbone.vision_token_ids(vlm.config),
            *(_first_set(config.suppress_tokens, own.suppress_tokens) or []),
        }
    )
    config.return_dict_in_generate = False
    config.do_sample = bool(config.do_sample)
    if not config.do_sample:  # sampling fields of the VLM's own file would only cause warnings
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    return config, limits


def _check_config(config: GenerationConfig, own: GenerationConfig) -> None:
    """Refuses what does not give one hidden state per token, or cannot work; `own` fills what `config` leaves open."""

    def asked(name: str) -> Any:
        return _first_set(getattr(config, name), getattr(own, name))

    for name in ("max_new_tokens", "max_length"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ValueError(f"generate_with_states: {name} is {value!r}; give a whole number of at least 1.")
    if (asked("num_beams") or 1) > 1 or asked("prompt_lookup_num_tokens") or asked("assistant_early_exit"):
        raise ValueError(
            "generate_with_states: beam search and assisted decoding do not keep one hidden state per token; "
            "use greedy decoding or sampling."
        )
    if (asked("guidance_scale") or 1) != 1:
        raise ValueError(
            f"generate_with_states: guidance_scale is {asked('guidance_scale')}, but guidance needs a prompt without "
            "images, which there is not; leave it out."
        )
    if asked("stop_strings"):
        raise ValueError(
            f"generate_with_states: stop_strings is {asked('stop_strings')!r}, but text is not read while it is "
            "written; give the tokens to stop at as eos_token_id."
        )


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _before_end(token_ids: Tensor, eos_token_id: int | list[int] | None, up_to: bool = False) -> Tensor:
    """(B, T) bool: true before the row's first end-of-sequence token, or `up_to` and with it."""
    ends = _is_end(token_ids, eos_token_id)
    return ends.cumsum(1) - ends.long() * up_to == 0


def _is_end(token_ids: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    ids = torch.tensor(_as_list(eos_token_id), dtype=token_ids.dtype, device=token_ids.device)
    return torch.isin(token_ids, ids)


def _within(limits: Tensor | None, rows: int, length: int) -> Tensor:
    """(B, length) bool: where a token is within the limit of its row; a prompt may have several rows."""
    if limits is None:
        return torch.ones(rows, length, dtype=torch.bool)
    limits = limits.repeat_interleave(rows // len(limits))
    return torch.arange(length, device=limits.device) < limits[:, None]


class _LateEnd(StoppingCriteria):
    """Ends a row one step after its end-of-sequence token, which is then read as any other.

    Args:
        eos_token_id: The tokens that end a row.
        prompt_length: Tokens of the prompts, among which such tokens end nothing.
    """

    def __init__(self, eos_token_id: int | list[int] | None, prompt_length: int) -> None:
        self._eos_token_id, self._prompt_length = eos_token_id, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """True for the rows that have ended before the last step."""
        return _is_end(input_ids[:, self._prompt_length : -1], self._eos_token_id).any(dim=1)


class StateRecorder(StoppingCriteria):
    """Records one (B, C) hidden state for each step of `generate`; it never stops a row.

    A hook on the language-model head sees the states of every forward pass, and `generate` asks its criteria once a
    step: passes of which no token comes (chunks of the prompt, passes that only keep processes in step) leave nothing.
    The head also lies outside of a compiled language model, which neither recompiles for the hook nor passes it by.

    Attributes:
        states: The states from which the tokens were predicted, in the order of the steps.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self._last: Tensor | None = None

    def see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The head's forward pre-hook."""
        self._last = inputs[0][:, -1]

    def stacked(self, hidden_states_at: str) -> Tensor:
        """(B, S, C) states of the tokens in their order; of the last token only where it has been read.

        Args:
            hidden_states_at: See `generate_with_states`.
        """
        states = self.states[int(hidden_states_at == "token") :]
        return torch.stack(states or [torch.zeros_like(self.states[0])], dim=1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Keeps the last state seen; true for no row."""
        if self._last is None:
            raise RuntimeError(
                "generate_with_states: the VLM was compiled as a whole by an earlier call, and its graph hides the "
                "hidden states; call torch.compiler.reset() before, or compile model.vlm.model.language_model alone."
            )
        self.states.append(self._last.clone())  # not a view, which would keep the states of the whole prompt
        self._last = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
