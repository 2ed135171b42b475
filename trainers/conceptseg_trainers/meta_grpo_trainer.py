"""Stage II: Meta-GRPO (paper, eq. 1, 2, 6, 7 and 8) on TRL's GRPOTrainer."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conceptseg_hf import (
    ConceptSegForSegmentation,
    ConceptSegProcessor,
    parse_completion,
    shared_prompts,
)
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.generation import StateRecorder
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.processing_conceptseg import CoordinateFrame
from conceptseg_hf.sam_prompt import ImageFeatures
from conceptseg_hf.vlm_families import get_family

from .batches import best_and_worst, group_rows, select_rows
from .callbacks import EpochCallback, ExampleImagesCallback, FormatOnlyWarning, TrainingExample
from .cards import as_list, write_training_card
from .checkpoints import run_folder
from .distributed import clone_unsharded, make_generate_gather, materialize
from .divergence import DivergenceCheckTrainer, FiniteLogs
from .loading import load_model, load_processor
from .meta_grpo_config import MetaGRPOConfig, without_renaming_warnings
from .rewards import REWARDS, Reward, box_iou_or_zero, completion_text
from .rollouts import Key, Prompt, PromptReader, Rollout, prompt_key, truncate_after_end
from .samples import by_name, check_arguments, check_sample_ids, rows_to_check
from .split_reference import COLUMNS, find_composer, set_epoch
from .trl_adapter import (
    Batch,
    GRPOTrainerAdapter,
    Rows,
    add_concept_head,
    read_prompts_once,
    replaced_generate,
    steps_per_generation,
)

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class MetaGRPOTrainer(DivergenceCheckTrainer, GRPOTrainerAdapter):
    """GRPOTrainer for the VLM and the CTM of a ConceptSeg model.

    There are two differences to GRPOTrainer. Each completion is also translated to concept tokens, from which SAM 3
    decodes the mask for the mask reward. And L_seg (eq. 8), computed in the same forward pass, is added to the policy
    loss.

    SAM 3 is frozen and removed from the module tree, so that it is neither trained nor sharded nor wrapped; it encodes
    the image of a prompt once for all completions. Checkpoints of a run do not contain SAM 3; `save_model()` writes
    the complete model (with PEFT only the adapter) and its processor. The reference policy is a copy of the VLM that is
    passed to the constructor: to resume a run, construct the trainer with the model that the run started from.

    Metrics logged in addition to those of GRPOTrainer: `loss/grpo`, `loss/seg`, `loss/dice`, `loss/focal`, `mask_iou`,
    `box_iou` and `check_iou` (if there is a proxy query). A training that diverges raises a `DivergedError`.

    Args:
        model: The model, a PEFT model that wraps one, or the folder or id of a checkpoint, which is loaded with
            `args.model_init_kwargs` (and `quantization_config`, if given). The default dtype is the checkpoint's.
        reward_funcs: Reward functions, as for GRPOTrainer; by default those of `args.rewards`. They receive the
            columns of the dataset and the column `predicted_mask`, (H, W) bool arrays.
        args: The settings.
        train_dataset: Dataset with the columns of `split_reference_dataset`.
        eval_dataset: Evaluation dataset with the same columns, or a dictionary of several.
        processing_class: The model's processor; by default that of the checkpoint, if `model` is a folder or id.
        ref_model: Reference policy to use instead of a copy: a ConceptSeg model or its VLM.
        **kwargs: Further arguments of GRPOTrainer, such as `peft_config` and `callbacks`.

    Attributes:
        concept_model: The model, without any wrapper.
        concept_processor: The model's processor; `processing_class` is the processor of the VLM alone.
        examples: The examples that `ExampleImagesCallback` draws next.

    Raises:
        ValueError: If model, processor or data cannot be used.
    """

    model: PreTrainedModel | PeftModel
    args: MetaGRPOConfig

    _tag_names = ["trl", "grpo", "meta-grpo"]  # noqa: RUF012, a list in TRL
    _name = "Meta-GRPO"

    def __init__(
        self,
        model: ConceptSegForSegmentation | PeftModel | str | os.PathLike,
        reward_funcs: Callable | list[Callable] | None = None,
        args: MetaGRPOConfig | None = None,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: ConceptSegProcessor | None = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = MetaGRPOConfig("meta-grpo") if args is None else args
        if is_checkpoint := isinstance(model, (str, os.PathLike)):
            if processing_class is None:
                processing_class = load_processor(model, args)
            model = load_model(model, args, kwargs.pop("quantization_config", None))
        adapted = is_peft_model(model) or kwargs.get("peft_config") is not None
        self.concept_model, self.concept_processor = check_arguments(
            "MetaGRPOTrainer", _without_adapters(model), args, MetaGRPOConfig, processing_class
        )

        self._family = get_family(self.concept_model.config.vlm_config)
        if args.use_vllm:
            self._family.check_vllm()
        self._vlm_processor = self.concept_processor.vlm_processor()
        self._reader = PromptReader(self.concept_processor, self._vlm_processor, args.max_prompt_length)
        for name, dataset in {"train_dataset": train_dataset, **by_name(eval_dataset)}.items():
            self._check_dataset(dataset, name)

        sam: nn.Module = materialize(self.concept_model.detach_sam())
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
                reward_funcs=_default_rewards(args) if reward_funcs is None else reward_funcs,
                args=args,
                keep_beta=adapted,
                ignored_settings=applied,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=self._vlm_processor,
                **kwargs,
            )
        sam.to(self.accelerator.device)
        read_prompts_once(self.concept_model, self.concept_model.vlm)
        add_concept_head(self.concept_model, args.detach_hidden_states)
        if self.beta and not adapted:
            self.set_reference(self._load_reference(ref_model))
        self._suppress_image_tokens()
        if use_vllm:
            self._start_vllm()

        _warn_of_inexact_resume(args)
        self.examples: list[TrainingExample] = []
        self._prompts: dict[Key, Prompt] = {}
        self._rollouts: list[Rollout] = []
        self._generated: tuple[list[list[int]], Tensor | None] = [], None
        self._saves_everything = False
        self.add_callback(EpochCallback(functools.partial(set_epoch, self.train_dataset)))
        self.add_callback(FormatOnlyWarning())
        self.add_callback(FiniteLogs())
        if args.log_examples:
            self.add_callback(ExampleImagesCallback(self, args.log_examples_steps, args.log_examples))

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
            model = load_model(self.args.ref_model_name_or_path, self.args, another_repository=True)
        model = self.concept_model if model is None else model
        return clone_unsharded(model.vlm if isinstance(model, ConceptSegForSegmentation) else model)

    def _suppress_image_tokens(self) -> None:
        """Suppress image tokens in completions, as the next forward pass would expect an image for each of them."""
        configured = self.generation_kwargs.get("suppress_tokens") or ()
        tokens = sorted({*configured, *self._family.vision_token_ids(self.concept_model.config.vlm_config)})
        self.generation_kwargs["suppress_tokens"] = tokens
        self.generation_config.suppress_tokens = tokens
        # A policy that has diverged has no valid probabilities; `check_loss` reports this in the following step.
        self.generation_config.remove_invalid_values = True

    def _start_vllm(self) -> None:
        from .vllm import ConceptVLLMGeneration

        tokens = self._family.vision_token_ids(self.concept_model.config.vlm_config)
        name = self.args.vllm_vlm_name_or_path
        assert name is not None  # checked by MetaGRPOConfig
        self.set_engine(ConceptVLLMGeneration.from_trainer(self, name, tokens))

    # -- rollouts --

    @contextmanager
    def rollout_context(self, inputs: Rows) -> Iterator[None]:
        """Encode each prompt once for all of its completions, and record the hidden states of generation."""
        make_generate_gather(self.model_wrapped)
        self._prompts = self._encode_prompts(inputs)
        with replaced_generate(self.concept_model, self._generate_recorded), without_renaming_warnings():
            yield
        self._prompts, self._rollouts, self._generated = {}, [], ([], None)

    def _generate_recorded(self, **arguments: Any) -> Tensor:
        inputs = {name: arguments.pop(name) for name in self._family.input_names}
        recorder = StateRecorder()
        handle = self.concept_model.get_output_embeddings().register_forward_pre_hook(recorder.record)
        try:
            sequences = shared_prompts.generate(
                self.concept_model.vlm, inputs, stopping_criteria=[recorder], **arguments
            )
        finally:
            handle.remove()
            self._family.reset(self.concept_model.vlm)
        tokens = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        self._generated = tokens, recorder.stacked(self.concept_model.config.hidden_states_at)
        return sequences

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
        """Read the prompts of the rows and encode their targets with SAM 3."""
        rows = {prompt_key(row): row for row in inputs}
        prompts = {key: self._reader.read(row) for key, row in rows.items()}
        features: list[ImageFeatures] = []
        with torch.no_grad():
            for chunk in self._chunks([prompt.target for prompt in prompts.values()]):
                pixels = self.concept_processor.sam_image_processor(images=list(chunk), return_tensors="pt")
                encoded = self.concept_model.encode_image(pixels["pixel_values"])
                features += [encoded.select(torch.tensor([number])) for number in range(len(chunk))]
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

    def before_rewards(
        self, inputs: Rows, completions: Sequence[Any], completion_ids: list[list[int]]
    ) -> None:
        """Add the column `predicted_mask`, which SAM 3 decodes from the concept tokens of each completion."""
        parsed = [parse_completion(completion_text(completion)) for completion in completions]
        self._rollouts = [
            Rollout(
                self._prompts[prompt_key(row)],
                completion,
                self.concept_model.config.sam_text_prompt(completion.answer, row["problem"]),
            )
            for completion, row in zip(parsed, inputs, strict=True)
        ]
        with torch.no_grad(), self.accelerator.autocast():
            logits = self._decode(self._rollouts, self._translate(completion_ids))
        for row, rollout, row_logits in zip(inputs, self._rollouts, logits, strict=True):
            target = rollout.prompt.target
            mask, _ = self.concept_processor.post_process_mask(row_logits[0], CoordinateFrame(target.size))
            row["predicted_mask"] = np.asarray(mask) > 0

    def after_rewards(self, inputs: Rows, completions: Sequence[Any], rewards: Tensor) -> None:
        """Log the IoUs of boxes and masks, and store examples for the example images."""
        ious = []
        for row, rollout in zip(inputs, self._rollouts, strict=True):
            prompt, completion = rollout.prompt, rollout.completion
            ignore = None if prompt.ignore is None else prompt.ignore.cpu().numpy()
            ious.append(foreground_iou(row["predicted_mask"], prompt.mask.cpu().numpy(), ignore))
            self.log_rollout("mask_iou", ious[-1])
            self.log_rollout("box_iou", box_iou_or_zero(completion.bbox, row["gt_box"]))
            if row["gt_check_box"] is not None:
                self.log_rollout("check_iou", box_iou_or_zero(completion.check, row["gt_check_box"]))
        if self.log_completions:
            self.log_column("answer", [rollout.completion.answer for rollout in self._rollouts])
            self.log_column("mask_iou", ious)
        self._keep_examples(inputs, rewards.tolist())

    def _translate(self, completion_ids: list[list[int]]) -> Tensor:
        """Return the (B, L2, D) concept tokens of the completions in `_rollouts` under the current policy.

        The hidden states of generation are reused if they are available: they are not with vLLM, nor for the last token
        of a truncated completion.
        """
        ends = set(self.eos_token_ids)
        text_tokens = [[token for token in ids if token not in ends] for ids in completion_ids]
        # The CTM computes the concept tokens from the hidden states of these tokens.
        ctm_tokens, has_end = text_tokens, [False] * len(text_tokens)
        if self.concept_model.config.end_of_turn_state:
            has_end = [not ends.isdisjoint(ids) for ids in completion_ids]
            ctm_tokens = [truncate_after_end(ids, ends) for ids in completion_ids]
        concepts: dict[int, Tensor] = {}
        tokens, states = self._generated
        if states is not None and not self.is_fsdp_enabled:
            num_states = states.shape[1]
            reusable = [
                row
                for row, (ids, generated) in enumerate(zip(ctm_tokens, tokens, strict=True))
                if len(ids) <= num_states and generated[: len(ids)] == ids
            ]
            if reusable:
                device = self.accelerator.device
                lengths = torch.tensor([len(ctm_tokens[row]) for row in reusable], device=device)
                mask = torch.arange(num_states, device=device) < lengths[:, None]
                embeds = self.concept_model.encode_concepts(states[reusable].to(device), mask)
                concepts = dict(zip(reusable, embeds, strict=True))
        remaining = [row for row in range(len(text_tokens)) if row not in concepts]
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        for start in range(0, len(remaining), size):
            rows = remaining[start : start + size]
            batch = self.concept_processor.collate(
                [self._rollouts[row].prompt.prepared for row in rows],
                [text_tokens[row] for row in rows],
                device=self.accelerator.device,
                end_of_turn=[has_end[row] for row in rows],
            )
            concepts |= zip(rows, self.model(**batch).concept_embeds, strict=True)
        return torch.stack([concepts[row] for row in range(len(text_tokens))])

    def _decode(self, rollouts: Sequence[Rollout], concept_embeds: Tensor) -> Tensor:
        """Return the (B, 1, h, w) mask logits for the prompts [Z; E_text(answer)] (eq. 4), differentiable in Z."""
        logits = []
        for chunk in self._chunks(list(zip(rollouts, concept_embeds, strict=True))):
            chunk_rollouts, chunk_concepts = zip(*chunk, strict=True)
            features = ImageFeatures.concatenate([rollout.prompt.features for rollout in chunk_rollouts])
            text = self.concept_processor.sam_text([rollout.sam_text for rollout in chunk_rollouts])
            mask_logits, _ = self.concept_model.decode_masks(features, *text, torch.stack(chunk_concepts))
            logits.append(mask_logits)
        return torch.cat(logits)

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

    # -- the loss --

    def forward_arguments(self, inputs: Batch) -> dict[str, Any]:
        """Return the mask of the tokens that the CTM reads; the end of turn is only included if the config says so."""
        completion_ids = inputs["completion_ids"]
        ctm_tokens = inputs["completion_mask"].bool()
        if not self.concept_model.config.end_of_turn_state:
            ends = torch.tensor(self.eos_token_ids, device=completion_ids.device)
            ctm_tokens = ctm_tokens & ~torch.isin(completion_ids, ends)
        prompts = torch.zeros_like(inputs["prompt_mask"], dtype=torch.bool)
        return {"concept_mask": torch.cat([prompts, ctm_tokens], dim=1)}

    def add_to_loss(self, policy_loss: Tensor, output: Any, inputs: Batch, steps: int) -> Tensor:
        """Add L_seg (eq. 8), computed from the concept tokens of the same forward pass."""
        # `mask_truncated_completions` masks all tokens of a truncated completion.
        included = inputs["completion_mask"].any(dim=1).tolist()
        dice, focal = self._segmentation_losses(inputs["rollouts"], output.concept_embeds, included)
        seg_loss = self.args.dice_weight * dice + self.args.focal_weight * focal
        parts = {"grpo": policy_loss * steps, "seg": seg_loss, "dice": dice, "focal": focal}
        for name, value in parts.items():
            self.log_mean(f"loss/{name}", value)
        loss = policy_loss + self.args.seg_loss_weight * seg_loss / steps
        self.check_loss(loss)
        return loss

    def _segmentation_losses(
        self, rollouts: Sequence[Rollout], concept_embeds: Tensor, included: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Return the dice and focal loss (eq. 5) at the resolution of the images, as means over the included rows."""
        logits = self._decode(rollouts, concept_embeds)
        parts = [
            segmentation_loss(
                row_logits[None],
                rollout.prompt.mask[None],
                self.args.focal_alpha,
                self.args.focal_gamma,
                None if rollout.prompt.ignore is None else rollout.prompt.ignore[None],
            )[1:]
            for rollout, row_logits, is_included in zip(rollouts, logits, included, strict=True)
            if is_included
        ]
        if not parts:
            zero = concept_embeds.sum() * 0
            return zero, zero
        dice, focal = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        return dice, focal

    # -- saving --

    def create_model_card(  # type: ignore[override]  # TRL's signature differs from the Trainer's
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write our model card, which names the license of SAM 3, to `output_dir`; adapters get TRL's model card."""
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
            f"Stage II, {self._name}: reinforcement learning of the VLM and the Concept Translation Module with TRL's "
            "GRPOTrainer.",
            [*self._tag_names, *as_list(tags)],
            datasets=as_list(dataset_name) or None,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the complete model; internal calls of the Trainer, for checkpoints of a run, omit SAM 3."""
        to_hub = output_dir is None  # the Trainer calls it without a folder before a push
        self._saves_everything = (to_hub or not _internal_call) and not is_peft_model(self.model)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._saves_everything = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._saves_everything:
            sam = {f"sam.{name}": weight for name, weight in self.concept_model.sam.state_dict().items()}
            state_dict = {**(self.concept_model.state_dict() if state_dict is None else state_dict), **sam}
            self._write_card(output_dir or run_folder(self.args))
        self.processing_class = self.concept_processor
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = self._vlm_processor


def _without_adapters(model: ConceptSegForSegmentation | PeftModel) -> nn.Module:
    return cast("PeftModel", model).get_base_model() if is_peft_model(model) else model


def _default_rewards(args: MetaGRPOConfig) -> list[Reward]:
    rewards: dict[str, Reward] = {
        **REWARDS,
        "format": functools.partial(REWARDS["format"], meta_reasoning=args.meta_reasoning),
        "meta": functools.partial(REWARDS["meta"], without_proxy=args.meta_without_proxy),
    }
    return [rewards[name] for name in args.rewards]


def _warn_of_inexact_resume(args: MetaGRPOConfig) -> None:
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


__all__ = ["MetaGRPOTrainer"]
