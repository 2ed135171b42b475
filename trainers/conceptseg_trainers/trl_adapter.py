"""All code that depends on private names of TRL.

`GRPOTrainerAdapter` and `VLLMGenerationAdapter` turn private methods of `GRPOTrainer` and `VLLMGeneration` into hooks
with documented arguments, and the functions below extend the forward pass that TRL patches. `PRIVATE_NAMES` lists
these names; tests/trainers/test_trl_adapter.py checks that the installed TRL defines them, and pyproject.toml restricts
TRL to the minor versions that were tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer, __version__
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from conceptseg_hf import ConceptSegForSegmentation, CoPRSForSegmentation, shared_prompts
from conceptseg_hf.coprs.sam_decoder import PriorFeatures
from conceptseg_hf.vlm_families import get_family

from .loading import changed_settings

if TYPE_CHECKING:
    from peft import PeftModel

try:
    from trl.trainer.utils import (
        FusedCausalLMOutput,
        add_fused_lm_head,
        split_pixel_values_by_grid,
        unsplit_pixel_values_by_grid,
    )
except ImportError as error:
    raise ImportError(
        f"MetaGRPOTrainer needs TRL 1.16 (Python 3.11 or newer), but TRL {__version__} is installed; upgrade it with: "
        "pip install -U 'trl~=1.16.0'"
    ) from error

Batch: TypeAlias = dict[str, Any]
"""Columns by name, as in GRPOTrainer: tensors and lists with one entry per completion, and scalars."""
Rows: TypeAlias = list[dict[str, Any]]
"""Rows of the dataset, one for each completion."""

PRIVATE_NAMES = {
    GRPOTrainer: (
        "_calculate_rewards",
        "_compute_loss",
        "_generate_and_score_completions",
        "_log_completion_extra",
        "_log_metric",
        "_prepare_inputs",
    ),
    VLLMGeneration: ("_init_vllm", "_iter_named_params"),
}
"""Private methods that are overridden or called, by class. The private attributes `_buffered_inputs`, `_metrics`,
`_step` and `_last_loaded_step` of a GRPOTrainer, and `LLM` in `trl.generation.vllm_generation`, are used as well."""


class GRPOTrainerAdapter(GRPOTrainer):
    """GRPOTrainer with documented hooks instead of private methods.

    Call `set_reference` to set the reference policy and `set_engine` to set the vLLM engine; TRL would load a second
    composite model for each of them.

    Args:
        model: The loaded model.
        reward_funcs: Reward functions.
        args: The settings.
        keep_beta: Let TRL handle the reference policy, which is the model with its adapters disabled.
        ignored_settings: Settings that have already been applied and are hidden from TRL.
        **kwargs: Further arguments of GRPOTrainer.
    """

    model: PreTrainedModel | PeftModel
    args: GRPOConfig
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    num_generations: int

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: GRPOConfig,
        *,
        keep_beta: bool,
        ignored_settings: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        beta = args.beta
        changed = {"beta": beta if keep_beta else 0.0, "use_vllm": False} | dict.fromkeys(ignored_settings)
        with changed_settings(args, changed):
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        self.beta = beta

    # -- hooks --

    def rollout_context(self, inputs: Rows) -> AbstractContextManager[None]:
        """Return a context manager in which the completions of rows are generated and scored."""
        return nullcontext()

    def finish_rollouts(self, output: Batch) -> Batch:
        """Modify the output of generation and rewards; see `Batch`."""
        return output

    def arrange_batches(self, batches: list[Batch]) -> list[Batch]:
        """Rearrange the batches of one generation after TRL has shuffled and split them."""
        return batches

    def before_rewards(
        self, inputs: Rows, completions: Sequence[Any], completion_ids: list[list[int]]
    ) -> None:
        """Add columns to the rows before the reward functions are called."""

    def after_rewards(self, inputs: Rows, completions: Sequence[Any], rewards: Tensor) -> None:
        """Process the (B, number of functions) rewards of this process; NaN where a function returned None."""

    def forward_arguments(self, inputs: Batch) -> dict[str, Any]:
        """Return additional arguments of the forward pass from which the policy loss is computed."""
        return {}

    def add_to_loss(self, policy_loss: Tensor, output: Any, inputs: Batch, steps: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            policy_loss: TRL's loss, already divided by `steps`.
            output: Output of the single forward pass.
            inputs: The batch.
            steps: Number of gradient accumulation steps; 1 during evaluation.
        """
        return policy_loss

    # -- methods for subclasses --

    def set_reference(self, reference: PreTrainedModel) -> None:
        """Set a frozen VLM as the reference policy."""
        add_fused_lm_head(reference, temperature=self.temperature)
        read_prompts_once(reference, reference)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)  # type: ignore[assignment]  # as TRL does
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def set_engine(self, generation: VLLMGeneration) -> None:
        """Use a vLLM engine for generation."""
        self.use_vllm = True
        self._last_loaded_step = -1
        self.vllm_generation = generation

    def log_mean(self, name: str, value: Tensor) -> None:
        """Log a scalar of this batch; the mean over processes and batches is reported."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    def log_rollout(self, name: str, value: float) -> None:
        """Log a scalar of one completion, as reward functions do."""
        self._log_metric(name, value)

    def log_column(self, name: str, values: list[Any]) -> None:
        """Add a column to the completions table, with one value per completion."""
        self._log_completion_extra(name, values)

    # -- overridden private methods of TRL --

    def _generate_and_score_completions(self, inputs: Rows) -> Batch:
        with self.rollout_context(inputs):
            return self.finish_rollouts(super()._generate_and_score_completions(inputs))

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        buffered = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not buffered:
            self._buffered_inputs = self.arrange_batches(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % steps_per_generation(self.args)]
        return inputs

    def _calculate_rewards(
        self,
        inputs: Rows,
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        self.before_rewards(inputs, completions, completion_ids_list)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(inputs)
        self.after_rewards(inputs, completions, rewards[first : first + len(inputs)])
        return rewards

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        arguments = self.forward_arguments(inputs)
        outputs: list[Any] = []

        def forward(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs, **arguments))
            return outputs[-1]

        policy_loss = super()._compute_loss(forward, inputs)
        (output,) = outputs
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        return self.add_to_loss(policy_loss, output, inputs, steps)


class VLLMGenerationAdapter(VLLMGeneration):
    """TRL's vLLM backend with hooks for the model that the engine loads and for the weights that it receives."""

    def engine_context(self) -> AbstractContextManager[None]:
        """Return a context manager in which the engine is built from `model.name_or_path`."""
        return nullcontext()

    def engine_options(self) -> dict[str, Any]:
        """Return arguments of a colocated `vllm.LLM` that replace TRL's or that TRL does not pass."""
        return {}

    def engine_name(self, name: str) -> str | None:
        """Return the engine's name of a model parameter, or None to omit the parameter."""
        return name

    def load_engine_weights(self, weights: Iterator[tuple[str, Tensor]]) -> bool:
        """Load weights into the colocated engine; return False to let TRL load them."""
        return False

    def after_synchronization(self) -> None:
        """Process the colocated engine after its weights have changed."""

    def engine_prompt(self, token_ids: list[int]) -> list[int]:
        """Return the prompt for the colocated engine."""
        return token_ids

    def generate(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Generate completions; see TRL.

        Raises:
            ValueError: If a colocated engine has expanded a prompt to other tokens.
        """
        if self.mode != "colocate":
            return super().generate(prompts, *args, **kwargs)
        outputs = super().generate([self.engine_prompt(ids) for ids in prompts], *args, **kwargs)
        for given, expanded in zip(prompts, outputs[0], strict=True):
            if list(expanded) != list(given):
                raise ValueError(
                    f"the vLLM engine reads a prompt of {len(given)} tokens as {len(expanded)} tokens; save the "
                    "processor of the trainer's VLM, processor.vlm_processor(), in the folder of the engine's VLM."
                )
        return outputs

    def sync_weights(self) -> None:
        """Send the weights of the model to the engine."""
        if self.mode != "colocate" or not self.load_engine_weights(self._iter_named_params()):
            super().sync_weights()
        if self.mode == "colocate":
            self.after_synchronization()

    def _init_vllm(self) -> None:
        with self.engine_context(), _llm_options(self.engine_options() if self.mode == "colocate" else {}):
            super()._init_vllm()

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        # Iterate over all parameters, even the omitted ones: gathering a parameter is a collective operation.
        for name, parameter in super()._iter_named_params():
            if (engine_name := self.engine_name(name)) is not None:
                yield engine_name, parameter


@contextmanager
def _llm_options(options: dict[str, Any]) -> Iterator[None]:
    """Temporarily replace the class `LLM` that TRL has imported, so that it is called with further arguments."""
    original = getattr(vllm_generation, "LLM", None)  # missing without vLLM
    if original is None or not options:
        yield
        return
    vllm_generation.LLM = lambda **arguments: original(**arguments | options)
    try:
        yield
    finally:
        vllm_generation.LLM = original


def steps_per_generation(args: GRPOConfig) -> int:
    """Return `steps_per_generation`, which GRPOConfig always sets although its type is optional."""
    return cast(int, args.steps_per_generation)


@dataclass
class ConceptLMOutput(FusedCausalLMOutput):
    """TRL's log-probabilities and the concept tokens (B, L2, D) of the same forward pass."""

    concept_embeds: Tensor | None = None


def read_prompts_once(model: PreTrainedModel, vlm: PreTrainedModel) -> None:
    """Patch `model.forward` to process each prompt of a batch once in `model(..., fused_lm_head=True, labels=labels)`.

    Args:
        model: A model with TRL's fused head.
        vlm: The VLM of the model, or the model itself.
    """
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or not kwargs.get("fused_lm_head") or not (labels != -100).any():
            return inner(*args, **kwargs)
        length = int((labels != -100).any(dim=0).nonzero()[0])  # prompts are padded on the left
        with shared_prompts.share_prompts(vlm, kwargs, length):
            output = inner(*args, **kwargs)
        get_family(vlm.config).reset(vlm)
        return output

    model.forward = forward


def add_concept_head(model: ConceptSegForSegmentation, detach_hidden_states: bool) -> None:
    """Patch `model.forward` to return concept tokens in `model(..., fused_lm_head=True, concept_mask=mask)`.

    All trained modules must run inside the forward pass that DDP, DeepSpeed or FSDP wraps.

    Args:
        model: The model, with TRL's fused head.
        detach_hidden_states: See `MetaGRPOConfig`.
    """
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, concept_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if concept_mask is None:
            return inner(*args, **kwargs)
        output, states = _forward_with_states(model, inner, *args, **kwargs)
        concept_embeds = model.translate_completion(states, concept_mask, detach_hidden_states)
        return ConceptLMOutput(**output, concept_embeds=concept_embeds)

    model.forward = forward


def _forward_with_states(
    model: ConceptSegForSegmentation | CoPRSForSegmentation,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Tensor]:
    """Run a forward pass of a model, and return its output and the VLM's (B, L, C) last hidden states."""
    states: list[Tensor] = []
    handle = model.base_model.register_forward_hook(
        lambda module, inputs, output: states.append(output.last_hidden_state)
    )
    try:
        output = forward(*args, **kwargs)
    finally:
        handle.remove()
    get_family(model.vlm.config).reset(model.vlm)
    return output, states[0]


@dataclass
class PriorLMOutput(FusedCausalLMOutput):
    """TRL's log-probabilities, and prior and masks of the same forward pass.

    Attributes:
        prior_logits: (B, 1, H, W) positional priors.
        mask_logits: (B, 1, H, W) masks.
        has_position: (B,) bool, whether the completion contains the concentration token.
    """

    prior_logits: Tensor | None = None
    mask_logits: Tensor | None = None
    has_position: Tensor | None = None


def add_prior_head(model: CoPRSForSegmentation) -> None:
    """Patch `model.forward` to return priors and masks in `model(..., fused_lm_head=True, position_mask=mask, ...)`.

    All trained modules must run inside the forward pass that DDP, DeepSpeed or FSDP wraps.

    Args:
        model: The model, with TRL's fused head.
    """
    inner = model.forward

    @functools.wraps(inner)
    def forward(
        *args: Any,
        position_mask: Tensor | None = None,
        sam_levels: Sequence[Tensor] | None = None,
        valid_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_mask is None or sam_levels is None or valid_sizes is None:
            if sam_levels is not None:
                kwargs["sam_features"] = PriorFeatures(tuple(sam_levels))
            if valid_sizes is not None:
                kwargs["valid_sizes"] = valid_sizes
            return inner(*args, **kwargs)
        output, states = _forward_with_states(model, inner, *args, **kwargs)
        features = PriorFeatures(tuple(sam_levels))
        positions, has_position = model.concentration_states(states, kwargs["input_ids"], position_mask)
        prior = model.compute_prior(positions, features, valid_sizes)
        masks = model.decode_masks(features, prior)
        return PriorLMOutput(**output, prior_logits=prior, mask_logits=masks, has_position=has_position)

    model.forward = forward


@contextmanager
def replaced_generate(model: Any, generate: Callable[..., Tensor]) -> Iterator[None]:
    """Temporarily replace `model.generate`, which TRL calls to sample completions."""
    model.generate = generate
    try:
        yield
    finally:
        del model.generate


__all__ = [
    "PRIVATE_NAMES",
    "ConceptLMOutput",
    "GRPOTrainerAdapter",
    "PriorLMOutput",
    "VLLMGenerationAdapter",
    "add_concept_head",
    "add_prior_head",
    "read_prompts_once",
    "replaced_generate",
    "split_pixel_values_by_grid",
    "steps_per_generation",
    "unsplit_pixel_values_by_grid",
]
