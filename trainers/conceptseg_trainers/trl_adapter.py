"""Everything that depends on private names of TRL, in one place.

`GRPOTrainerAdapter` and `VLLMGenerationAdapter` turn private methods of `GRPOTrainer` and `VLLMGeneration` into hooks
with documented arguments, and the functions below extend the forward pass that TRL patches. `PRIVATE_NAMES` lists what
is relied on; tests/trainers/test_trl_adapter.py checks that the installed TRL has it, and pyproject.toml admits the
minor versions that were tested.
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
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from conceptseg_hf import ConceptSegForSegmentation, shared_prompts, vlm_backbone

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
        f"MetaGRPOTrainer needs TRL 1.16, and that Python 3.11; here TRL is {__version__}. Install it with: "
        "pip install -U 'trl~=1.16.0'."
    ) from error

Batch: TypeAlias = dict[str, Any]
"""Columns by name, as GRPOTrainer has them: tensors and lists with an entry per completion, and scalars."""
Rows: TypeAlias = list[dict[str, Any]]
"""Rows of the data set, one for each completion."""

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
"""Private methods that are overridden or called, by class. Attributes of instances: `_buffered_inputs`, `_metrics`,
`_step` and `_last_loaded_step` of a GRPOTrainer."""


class GRPOTrainerAdapter(GRPOTrainer):
    """GRPOTrainer with hooks in the place of its private methods.

    Its reference policy is made by `set_reference` and its vLLM engine by `set_engine`, as TRL would load a second
    composite model for either.

    Args:
        model: The model, loaded.
        reward_funcs: Reward functions.
        args: The settings.
        keep_beta: Leave the reference policy to TRL, which turns adapters off for it.
        ignored_settings: Settings that have been used already.
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

    # Hooks

    def rollout_context(self, inputs: Rows) -> AbstractContextManager[None]:
        """A block in which completions of rows are generated and scored."""
        return nullcontext()

    def finish_rollouts(self, output: Batch) -> Batch:
        """Changes what generation and rewards have given; see `Batch`."""
        return output

    def arrange_batches(self, batches: list[Batch]) -> list[Batch]:
        """Arranges the batches of one generation, which TRL has shuffled and split."""
        return batches

    def before_rewards(
        self, inputs: Rows, completions: Sequence[Any], completion_ids: list[list[int]]
    ) -> None:
        """Adds columns to the rows before reward functions see them."""

    def after_rewards(self, inputs: Rows, completions: Sequence[Any], rewards: Tensor) -> None:
        """Sees the (B, number of functions) rewards of this process's completions; NaN where a function gave none."""

    def forward_arguments(self, inputs: Batch) -> dict[str, Any]:
        """Further arguments of the forward pass from which the policy loss is computed."""
        return {}

    def add_to_loss(self, policy_loss: Tensor, output: Any, inputs: Batch, steps: int) -> Tensor:
        """The loss of a batch.

        Args:
            policy_loss: TRL's loss, divided by `steps` already.
            output: The output of the only forward pass.
            inputs: The batch.
            steps: Batches whose gradients are accumulated; 1 in an evaluation.
        """
        return policy_loss

    # For subclasses

    def set_reference(self, reference: PreTrainedModel) -> None:
        """Makes a frozen VLM the reference policy."""
        add_fused_lm_head(reference, temperature=self.temperature)
        read_prompts_once(reference, reference)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(reference, self.accelerator)  # type: ignore[assignment]  # as TRL does
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def set_engine(self, generation: VLLMGeneration) -> None:
        """Makes a vLLM engine write the completions."""
        self.use_vllm = True
        self._last_loaded_step = -1
        self.vllm_generation = generation

    def log_mean(self, name: str, value: Tensor) -> None:
        """Logs a number of this batch; the mean over processes and batches is reported."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    def log_rollout(self, name: str, value: float) -> None:
        """Logs a number of one completion, as reward functions do."""
        self._log_metric(name, value)

    def log_column(self, name: str, values: list[Any]) -> None:
        """Adds a column to the table of completions, one value for each."""
        self._log_completion_extra(name, values)

    # What the hooks replace

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
    """TRL's vLLM backend with hooks for what the engine is built from and which weights it gets."""

    def engine_context(self) -> AbstractContextManager[None]:
        """A block in which the engine is built from `model.name_or_path`."""
        return nullcontext()

    def engine_name(self, name: str) -> str | None:
        """The engine's name of a parameter of the model; None leaves it out."""
        return name

    def _init_vllm(self) -> None:
        with self.engine_context():
            super()._init_vllm()

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        # Every parameter is walked, even those left out: to gather one is a collective operation.
        for name, parameter in super()._iter_named_params():
            if (known_as := self.engine_name(name)) is not None:
                yield known_as, parameter


def steps_per_generation(args: GRPOConfig) -> int:
    """The setting, which GRPOConfig fills in although its type admits None."""
    return cast(int, args.steps_per_generation)


@dataclass
class ConceptLMOutput(FusedCausalLMOutput):
    """TRL's log-probabilities, and the concept tokens (B, L2, D) of the same forward pass."""

    concept_embeds: Tensor | None = None


def read_prompts_once(model: PreTrainedModel, vlm: PreTrainedModel) -> None:
    """Lets `model(..., fused_lm_head=True, labels=labels)` read each prompt of a batch once.

    Args:
        model: A model with TRL's fused head.
        vlm: The VLM in it, or itself.
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
        vlm_backbone.reset_rope_deltas(vlm)
        return output

    model.forward = forward


def add_concept_head(model: ConceptSegForSegmentation, detach_hidden_states: bool) -> None:
    """Lets `model(..., fused_lm_head=True, concept_mask=mask)` return concept tokens beside log-probabilities.

    All that is trained must run inside the forward pass that DDP, DeepSpeed or FSDP has wrapped.

    Args:
        model: The model, with TRL's fused head.
        detach_hidden_states: See `MetaGRPOConfig`.
    """
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, concept_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if concept_mask is None:
            return inner(*args, **kwargs)
        states: list[Tensor] = []
        handle = model.base_model.register_forward_hook(
            lambda module, inputs, output: states.append(output.last_hidden_state)
        )
        try:
            output = inner(*args, **kwargs)
        finally:
            handle.remove()
        vlm_backbone.reset_rope_deltas(model.vlm)
        concept_embeds = model.translate_completion(states[0], concept_mask, detach_hidden_states)
        return ConceptLMOutput(**output, concept_embeds=concept_embeds)

    model.forward = forward


@contextmanager
def replaced_generate(model: ConceptSegForSegmentation, generate: Callable[..., Tensor]) -> Iterator[None]:
    """A block in which TRL, which calls `model.generate`, gets its completions from another function."""
    model.generate = generate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.generate


__all__ = [
    "PRIVATE_NAMES",
    "ConceptLMOutput",
    "GRPOTrainerAdapter",
    "VLLMGenerationAdapter",
    "add_concept_head",
    "read_prompts_once",
    "replaced_generate",
    "split_pixel_values_by_grid",
    "steps_per_generation",
    "unsplit_pixel_values_by_grid",
]
