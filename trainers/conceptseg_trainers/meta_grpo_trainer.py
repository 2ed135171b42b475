"""Stage II: Meta-GRPO (paper, eq. 1, 2, 6, 7 and 8) on TRL's GRPOTrainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, parse_completion
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.generation import StateRecorder
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.processing_conceptseg import CoordinateFrame
from conceptseg_hf.sam_prompt import ImageFeatures

from .grpo_trainer import SegmentationGRPOTrainer
from .meta_grpo_config import MetaGRPOConfig
from .rewards import REWARDS, Reward, box_iou_or_zero, completion_text
from .rollouts import Rollout, prompt_key, truncate_after_end
from .trl_adapter import Batch, Rows, add_concept_head

logger = logging.getLogger(__name__)


class MetaGRPOTrainer(SegmentationGRPOTrainer):
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

    args: MetaGRPOConfig
    model_class = ConceptSegForSegmentation
    processor_class = ConceptSegProcessor
    config_class = MetaGRPOConfig
    card_text = (
        "Stage II, Meta-GRPO: reinforcement learning of the VLM and the Concept Translation Module with TRL's "
        "GRPOTrainer."
    )

    _tag_names = ["trl", "grpo", "meta-grpo"]  # noqa: RUF012, a list in TRL
    _name = "Meta-GRPO"
    _generated: tuple[list[list[int]], Tensor | None] = [], None

    # -- construction --

    def detach_frozen(self) -> nn.Module:
        """Remove SAM 3 from the module tree."""
        return self.concept_model.detach_sam()

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the weights of SAM 3."""
        return {f"sam.{name}": weight for name, weight in self.concept_model.sam.state_dict().items()}

    def extend_forward(self) -> None:
        """Add the concept tokens to the output of the model."""
        add_concept_head(self.concept_model, self.args.detach_hidden_states)

    def default_rewards(self, args: MetaGRPOConfig) -> list[Reward]:
        """Return the rewards of `args.rewards` with their settings."""
        return _default_rewards(args)

    def start_engine(self) -> None:
        """Build the colocated engine of the VLM."""
        from .vllm import ConceptVLLMGeneration

        tokens = self._family.vision_token_ids(self.concept_model.config.vlm_config)
        name = self.args.vllm_vlm_name_or_path
        assert name is not None  # checked by MetaGRPOConfig
        self.set_engine(ConceptVLLMGeneration.from_trainer(self, name, tokens))

    # -- rollouts --

    @contextmanager
    def rollout_context(self, inputs: Rows) -> Iterator[None]:
        """Encode each prompt once for all of its completions, and keep the hidden states of generation."""
        with super().rollout_context(inputs):
            yield
        self._generated = [], None

    def generate_completions(self, **arguments: Any) -> Tensor:
        """Generate completions, and record the hidden states of generation."""
        length = arguments["input_ids"].shape[1]
        recorder = StateRecorder()
        handle = self.concept_model.get_output_embeddings().register_forward_pre_hook(recorder.record)
        try:
            sequences = super().generate_completions(stopping_criteria=[recorder], **arguments)
        finally:
            handle.remove()
        tokens = sequences[:, length:].tolist()
        self._generated = tokens, recorder.stacked(self.concept_model.config.hidden_states_at)
        return sequences

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


def _default_rewards(args: MetaGRPOConfig) -> list[Reward]:
    rewards: dict[str, Reward] = {
        **REWARDS,
        "format": functools.partial(REWARDS["format"], meta_reasoning=args.meta_reasoning),
        "meta": functools.partial(REWARDS["meta"], without_proxy=args.meta_without_proxy),
    }
    return [rewards[name] for name in args.rewards]


__all__ = ["MetaGRPOTrainer"]
