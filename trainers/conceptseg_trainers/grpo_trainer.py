"""GRPO of a VLM whose completions are decoded to masks: what `MetaGRPOTrainer` and `CoPRSTrainer` have in common."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from accelerate.utils import is_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from conceptseg_hf import shared_prompts
from conceptseg_hf.vlm_families import get_family

from .batches import best_and_worst, group_rows, select_rows
from .callbacks import EpochCallback, ExampleImagesCallback, FormatOnlyWarning, TrainingExample
from .cards import as_list, write_training_card
from .checkpoints import run_folder
from .distributed import clone_unsharded, make_generate_gather, materialize
from .divergence import DivergenceCheckTrainer, FiniteLogs
from .grpo_config import SegmentationGRPOConfig, without_renaming_warnings
from .loading import load_model, load_processor
from .rewards import Reward
from .rollouts import Key, Prompt, PromptReader, Rollout, prompt_key
from .samples import by_name, check_arguments, check_sample_ids, rows_to_check
from .split_reference import COLUMNS, find_composer, set_epoch
from .trl_adapter import (
    Batch,
    GRPOTrainerAdapter,
    Rows,
    read_prompts_once,
    replaced_generate,
    steps_per_generation,
)

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class SegmentationGRPOTrainer(DivergenceCheckTrainer, GRPOTrainerAdapter):
    """GRPOTrainer for the VLM and further modules of a model that decodes a mask from each completion.

    Subclasses define which modules are frozen, how masks are decoded for the rewards (`before_rewards`), and the
    segmentation loss (`add_to_loss`).

    Attributes:
        model_class: Class of the model.
        processor_class: Class of its processor.
        config_class: Class of the settings.
        card_text: Description of the training for the model card.
        concept_model: The model, without any wrapper.
        concept_processor: The model's processor; `processing_class` is the processor of the VLM alone.
        examples: The examples that `ExampleImagesCallback` draws next.
    """

    model: PreTrainedModel | PeftModel
    args: SegmentationGRPOConfig
    model_class: Any
    processor_class: Any
    config_class: Any
    card_text: str

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable | list[Callable] | None = None,
        args: SegmentationGRPOConfig | None = None,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.config_class(self._tag_names[-1]) if args is None else args
        if is_checkpoint := isinstance(model, (str, os.PathLike)):
            if processing_class is None:
                processing_class = load_processor(model, args, self.processor_class)
            model = load_model(
                model, args, kwargs.pop("quantization_config", None), model_class=self.model_class
            )
        adapted = is_peft_model(model) or kwargs.get("peft_config") is not None
        self.concept_model, self.concept_processor = check_arguments(
            type(self).__name__,
            _without_adapters(model),
            args,
            self.config_class,
            processing_class,
            self.model_class,
            self.processor_class,
        )

        self._family = get_family(self.concept_model.config.vlm_config)
        if args.use_vllm:
            self._family.check_vllm()
        self._vlm_processor = self.concept_processor.vlm_processor()
        self._reader = PromptReader(self.concept_processor, self._vlm_processor, args.max_prompt_length)
        for name, dataset in {"train_dataset": train_dataset, **by_name(eval_dataset)}.items():
            self._check_dataset(dataset, name)

        frozen = materialize(self.detach_frozen())
        if args.freeze_vision_tower:
            self._family.vision_tower(self.concept_model.vlm).requires_grad_(False)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        # `model_init_kwargs` has been applied; TRL would warn that it is ignored.
        applied = (
            ["model_init_kwargs"]
            if is_checkpoint and not any(isinstance(reward, str) for reward in rewards)
            else []
        )
        use_vllm = args.use_vllm
        with without_renaming_warnings():
            super().__init__(
                model=model,
                reward_funcs=self.default_rewards(args) if reward_funcs is None else reward_funcs,
                args=args,
                keep_beta=adapted,
                ignored_settings=applied,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=self._vlm_processor,
                **kwargs,
            )
        frozen.to(self.accelerator.device)
        read_prompts_once(self.concept_model, self.concept_model.vlm)
        self.extend_forward()
        if self.beta and not adapted:
            self.set_reference(self._load_reference(ref_model))
        self._suppress_image_tokens()
        if use_vllm:
            self.start_engine()

        _warn_of_inexact_resume(args)
        self.examples: list[TrainingExample] = []
        self._prompts: dict[Key, Prompt] = {}
        self._rollouts: list[Rollout] = []
        self._saves_everything = False
        self.add_callback(EpochCallback(functools.partial(set_epoch, self.train_dataset)))
        self.add_callback(FormatOnlyWarning())
        self.add_callback(FiniteLogs())
        if args.log_examples:
            self.add_callback(ExampleImagesCallback(self, args.log_examples_steps, args.log_examples))

    # -- hooks for subclasses --

    def detach_frozen(self) -> nn.Module:
        """Remove the frozen part of SAM from the module tree of the model, and return it.

        It is neither trained nor sharded nor wrapped, nor part of checkpoints of a run.
        """
        raise NotImplementedError

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the weights of the frozen part by their names in the complete model."""
        raise NotImplementedError

    def extend_forward(self) -> None:
        """Extend `model.forward`: all trained modules must run inside the pass that DDP, DeepSpeed or FSDP wraps."""
        raise NotImplementedError

    def default_rewards(self, args: Any) -> list[Reward]:
        """Return the reward functions of the settings."""
        raise NotImplementedError

    def start_engine(self) -> None:
        """Start the engine of `args.use_vllm`."""
        raise NotImplementedError

    def encode_images(self, images: Sequence[Image.Image]) -> list[Any]:
        """Return SAM's features of each image, with batch size 1."""
        pixels = self.concept_processor.sam_image_processor(images=list(images), return_tensors="pt")
        encoded = self.concept_model.encode_image(pixels["pixel_values"].to(self.accelerator.device))
        return [encoded.select(torch.tensor([number])) for number in range(len(images))]

    # -- construction --

    def _check_dataset(self, dataset: Any, name: str) -> None:
        """Set the processor of a split-reference dataset, and check some rows."""
        if (composer := find_composer(dataset)) is not None:
            composer.processor = self.concept_processor
        for number, row in enumerate(rows_to_check(dataset)):
            missing = [column for column in COLUMNS if column not in row]
            if missing:
                raise ValueError(
                    f"{name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; create it with "
                    "split_reference_dataset, or add the missing columns."
                )
            self._reader.read(row)
            if number == 0 and composer is None:
                check_sample_ids(dataset, name)

    def _load_reference(self, model: PreTrainedModel | None) -> PreTrainedModel:
        if model is None and self.args.ref_model_name_or_path is not None:
            model = load_model(
                self.args.ref_model_name_or_path,
                self.args,
                another_repository=True,
                model_class=self.model_class,
            )
        model = self.concept_model if model is None else model
        return clone_unsharded(model.vlm if isinstance(model, self.model_class) else model)

    def _suppress_image_tokens(self) -> None:
        """Suppress image tokens in completions, as the next forward pass would expect an image for each of them."""
        configured = self.generation_kwargs.get("suppress_tokens") or ()
        tokens = sorted({*configured, *self._family.vision_token_ids(self.concept_model.config.vlm_config)})
        self.generation_kwargs["suppress_tokens"] = tokens
        self.generation_config.suppress_tokens = tokens
        # A policy that has diverged has no valid probabilities; `check_loss` reports this in the following step.
        self.generation_config.remove_invalid_values = True

    # -- rollouts --

    @contextmanager
    def rollout_context(self, inputs: Rows) -> Iterator[None]:
        """Encode each prompt once for all of its completions."""
        make_generate_gather(self.model_wrapped)
        self._prompts = self._encode_prompts(inputs)
        with replaced_generate(self.concept_model, self.generate_completions), without_renaming_warnings():
            yield
        self._prompts, self._rollouts = {}, []

    def generate_completions(self, **arguments: Any) -> Tensor:
        """Generate like the VLM's `generate`, but read each prompt once; subclasses may record hidden states."""
        inputs = {name: arguments.pop(name) for name in self._family.input_names}
        try:
            return shared_prompts.generate(self.concept_model.vlm, inputs, **arguments)
        finally:
            self._family.reset(self.concept_model.vlm)

    def finish_rollouts(self, output: Batch) -> Batch:
        """Add the rollouts, which the loss needs, and select the completions to train on."""
        # TRL shuffles and splits the list along with the tensors; completions of a prompt share one `Prompt`.
        output["rollouts"] = self._rollouts
        count = self.args.num_best_and_worst
        if not self.model.training or count is None:
            return output
        output = select_rows(output, best_and_worst(output["advantages"], self.num_generations, count))
        if "num_items_in_batch" in output:
            output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return output

    def arrange_batches(self, batches: list[Batch]) -> list[Batch]:
        """Place the completions of a prompt next to each other, so that a batch processes the prompt once."""
        return group_rows(batches, lambda batch, row: id(batch["rollouts"][row].prompt))

    def _encode_prompts(self, inputs: list[dict[str, Any]]) -> dict[Key, Prompt]:
        """Read the prompts of the rows and encode their targets with SAM."""
        rows = {prompt_key(row): row for row in inputs}
        prompts = {key: self._reader.read(row) for key, row in rows.items()}
        features: list[Any] = []
        with torch.no_grad():
            for chunk in self._chunks([prompt.target for prompt in prompts.values()]):
                features += self.encode_images(chunk)
        device = self.accelerator.device
        return {
            key: replace(
                prompt,
                mask=prompt.mask.to(device),
                ignore=None if prompt.ignore is None else prompt.ignore.to(device),
                features=feature,
            )
            for (key, prompt), feature in zip(prompts.items(), features, strict=True)
        }

    def _chunks(self, items: Sequence[Any]) -> Iterable[Sequence[Any]]:
        size = self.args.sam_decode_batch_size
        return (items[start : start + size] for start in range(0, len(items), size))

    def _keep_examples(self, inputs: Rows, rewards: list[list[float]]) -> None:
        """Store the first completion of some prompts for the example images."""
        self.examples = []
        first_rows = {prompt_key(row): number for number, row in reversed(list(enumerate(inputs)))}
        for number in sorted(first_rows.values())[: self.args.log_examples]:
            row, rollout = inputs[number], self._rollouts[number]
            prompt, completion = rollout.prompt, rollout.completion
            named_rewards = zip(self.reward_func_names, rewards[number], strict=True)
            self.examples.append(
                TrainingExample(
                    target=prompt.target,
                    gt_mask=prompt.mask.cpu().numpy(),
                    predicted_mask=row["predicted_mask"],
                    mosaic=row["images"][0] if len(row["images"]) > 1 else None,
                    rule=completion.rule,
                    answer=completion.answer,
                    rewards={name: value for name, value in named_rewards if value == value},
                )
            )

    # -- saving --

    def create_model_card(  # type: ignore[override]  # TRL's signature differs from the Trainer's
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write our model card, which names the license of SAM, to `output_dir`; adapters get TRL's model card."""
        if is_peft_model(self.model):
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            self._write_card(run_folder(self.args), tags, dataset_name)

    def _write_card(
        self, folder: str, tags: str | list[str] | None = None, dataset_name: str | None = None
    ) -> None:
        write_training_card(
            folder,
            self.concept_model.config,
            self.card_text,
            [*self._tag_names, *as_list(tags)],
            datasets=as_list(dataset_name) or None,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the complete model; internal calls of the Trainer, for checkpoints of a run, omit its frozen part."""
        to_hub = output_dir is None  # the Trainer calls it without a folder before a push
        self._saves_everything = (to_hub or not _internal_call) and not is_peft_model(self.model)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._saves_everything = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._saves_everything:
            trained = self.concept_model.state_dict() if state_dict is None else state_dict
            state_dict = {**trained, **self.frozen_weights()}
            if self.args.should_save:  # all processes come here
                self._write_card(output_dir or run_folder(self.args))
        self.processing_class = self.concept_processor
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = self._vlm_processor


def _without_adapters(model: PreTrainedModel | PeftModel) -> nn.Module:
    return cast("PeftModel", model).get_base_model() if is_peft_model(model) else model


def _warn_of_inexact_resume(args: SegmentationGRPOConfig) -> None:
    """Warn if a checkpoint may be saved inside of a generation batch, as checkpoints do not contain its completions."""
    generation = steps_per_generation(args) * args.num_iterations
    if (
        args.save_strategy == "steps"
        and args.save_steps >= 1
        and args.save_steps * args.gradient_accumulation_steps % generation
    ):
        logger.warning(
            "save_steps is %d, so checkpoints are saved inside of a generation batch and a resumed run continues with "
            "different completions; make save_steps * gradient_accumulation_steps a multiple of %d.",
            args.save_steps,
            generation,
        )


__all__ = ["SegmentationGRPOTrainer"]
