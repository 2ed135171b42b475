"""GRPO with segmentation supervision of CoPRS (eq. 4 to 8) on TRL's GRPOTrainer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from conceptseg_hf import CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.coprs.completion import parse_reasoning
from conceptseg_hf.coprs.losses import prior_losses
from conceptseg_hf.coprs.positional_prior import padding_mask
from conceptseg_hf.coprs.sam_decoder import PriorFeatures
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.processing_conceptseg import CoordinateFrame

from .coprs_config import CoPRSTrainerConfig
from .distributed import gathered, is_sharded
from .feature_store import FeatureStore
from .grpo_trainer import SegmentationGRPOTrainer
from .rewards import COPRS_REWARDS, Reward, completion_text
from .rollouts import Prompt, Rollout, prompt_key
from .trl_adapter import Batch, Rows, add_prior_head


class CoPRSTrainer(SegmentationGRPOTrainer):
    """GRPOTrainer for a CoPRS model.

    There are two differences to GRPOTrainer. The concentration token of each completion gives a positional prior, from
    which SAM decodes the mask for the mask reward. And L_SEG (eq. 8), computed in the same forward pass, is added to
    the policy loss.

    SAM's image encoder is frozen and removed from the module tree. The learning rates of the prior, of SAM's prompt
    encoder and of its mask decoder are multiples of that of the VLM. To resume a run, construct the trainer with the
    model that the run started from, which is the reference.

    Metrics logged in addition to those of GRPOTrainer: `loss/grpo`, `loss/seg`, `loss/prior`, `loss/dice`, `loss/focal`
    and `mask_iou`.

    Args:
        model: The model, a PEFT model that wraps one, or the folder or id of a checkpoint; see `MetaGRPOTrainer`.
        reward_funcs: Reward functions; by default those of `args.rewards`. They receive the columns of the dataset and
            the columns `predicted_mask`, (H, W) bool, and `predicted_probability`, (H, W) float.
        args: The settings, a `CoPRSTrainerConfig`.
        train_dataset: Dataset with the columns of `split_reference_dataset`.
        eval_dataset: Evaluation dataset with the same columns, or a dictionary of several.
        processing_class: The model's `CoPRSProcessor`.
        ref_model: Reference policy to use instead of a copy: a CoPRS model.
        **kwargs: Further arguments of GRPOTrainer, such as `peft_config` and `callbacks`.
    """

    args: CoPRSTrainerConfig
    model_class = CoPRSForSegmentation
    processor_class = CoPRSProcessor
    config_class = CoPRSTrainerConfig
    card_text = (
        "CoPRS: reinforcement learning of the VLM with TRL's GRPOTrainer, and segmentation supervision of the VLM, the "
        "positional prior and SAM's mask decoder."
    )

    _tag_names = ["trl", "grpo", "coprs"]  # noqa: RUF012, a list in TRL
    _name = "CoPRS"
    _reference_modules: CoPRSForSegmentation | None = None
    _features: FeatureStore | None = None

    # -- construction --

    def detach_frozen(self) -> nn.Module:
        """Remove SAM's image encoder from the module tree, and let `<REF_POS>` end completions."""
        model = self.concept_model
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        model.generation_config.eos_token_id = list(dict.fromkeys([*ends, model.config.ref_pos_token_id]))
        return model.detach_encoder()

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the weights of SAM's image encoder."""
        encoder = self.concept_model.sam.vision_encoder
        return {f"sam.vision_encoder.{name}": weight for name, weight in encoder.state_dict().items()}

    def extend_forward(self) -> None:
        """Add priors and masks to the output of the model, and copy the initial modules for the rewards."""
        if self.args.reward_masks == "reference":
            self._reference_modules = _copy_of_modules(self.concept_model)
        add_prior_head(self.concept_model)
        if self.args.image_features_dir is not None:
            self._features = FeatureStore(self.args.image_features_dir, self.concept_model.sam.vision_encoder)

    def _load_reference(self, model: PreTrainedModel | None) -> PreTrainedModel:
        if isinstance(model, CoPRSForSegmentation) and self._reference_modules is not None:
            self._reference_modules = _copy_of_modules(model)
        return super()._load_reference(model)

    def default_rewards(self, args: CoPRSTrainerConfig) -> list[Reward]:
        """Return the rewards of `args.rewards`."""
        return [COPRS_REWARDS[name] for name in args.rewards]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; each part of the model has its own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        part_of = {
            parameter: next((part for part in self._rates if f"{part}." in name), "")
            for name, parameter in self.model.named_parameters()
        }
        groups = []
        for group in optimizer.param_groups:
            for part, rate in (("", 1.0), *self._rates.items()):
                parameters = [p for p in group["params"] if part_of[p] == part]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": group["lr"] * rate})
        optimizer.param_groups[:] = groups
        return optimizer

    @property
    def _rates(self) -> dict[str, float]:
        """Multiples of the learning rate by part of the model."""
        args = self.args
        return {
            "prior": args.prior_rate,
            "sam.prompt_encoder": args.prompt_encoder_rate,
            "sam.mask_decoder": args.mask_decoder_rate,
        }

    # -- rollouts --

    def encode_images(self, images: Sequence[Image.Image]) -> list[PriorFeatures]:
        """Return SAM's features of each image, from the disk if they are stored."""
        if self._features is None:
            return super().encode_images(images)
        device = self.accelerator.device
        encode = super().encode_images
        return [
            self._features.get(image, functools.partial(_first, encode, image)).to(device) for image in images
        ]

    def before_rewards(
        self, inputs: Rows, completions: Sequence[Any], completion_ids: list[list[int]]
    ) -> None:
        """Add the columns `predicted_mask` and `predicted_probability` of each completion."""
        self._rollouts = [
            Rollout(self._prompts[prompt_key(row)], parse_reasoning(completion_text(completion)), "")
            for completion, row in zip(completions, inputs, strict=True)
        ]
        numbers = range(len(inputs))
        for chunk in self._chunks(numbers):
            with torch.no_grad(), self.accelerator.autocast():
                logits, has_position = self._decode(
                    [self._rollouts[i].prompt for i in chunk], [completion_ids[i] for i in chunk]
                )
            for row_logits, found, i in zip(logits, has_position.tolist(), chunk, strict=True):
                size = self._rollouts[i].prompt.target.size
                probability = np.zeros((size[1], size[0]), dtype=np.float32)
                if found:
                    _, probability = self.concept_processor.post_process_mask(
                        self._without_padding(row_logits[0], size), CoordinateFrame(size)
                    )
                inputs[i]["predicted_probability"] = probability
                inputs[i]["predicted_mask"] = probability > 0.5

    def _decode(self, prompts: Sequence[Prompt], completion_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return (B, 1, H, W) mask logits of completions, and (B,) whether they have a concentration token."""
        device = self.accelerator.device
        # `collate` terminates completions with the end-of-turn token.
        end = self.concept_processor.tokenizer.eos_token_id
        texts = [[token for token in ids if token != end] for ids in completion_ids]
        batch = self.concept_processor.collate([prompt.prepared for prompt in prompts], texts, device=device)
        features, sizes = self._features_of(prompts)
        modules = self._reference_modules
        if modules is None:
            output = self.model(**batch, sam_levels=features.levels, valid_sizes=sizes)
            return output.mask_logits, output.has_position
        modules.to(device)
        with self._as_reference() as vlm:
            hidden = self._family.last_hidden_states(vlm, self._family.model_inputs(batch))
        states, has_position = self.concept_model.concentration_states(
            hidden, batch["input_ids"], batch["completion_mask"]
        )
        prior = modules.compute_prior(states, features, sizes)
        return modules.decode_masks(features, prior), has_position

    def _as_reference(self) -> Any:
        """Return a context manager that yields the VLM of the reference policy."""
        return reference_vlm(self)

    def _features_of(self, prompts: Sequence[Prompt]) -> tuple[PriorFeatures, Tensor]:
        """Return features and sizes (see `CoPRSProcessor.valid_size`) of the targets of prompts."""
        features = PriorFeatures.concatenate([prompt.features for prompt in prompts])
        sizes = [self.concept_processor.valid_size(prompt.target.size) for prompt in prompts]
        return features, torch.tensor(sizes, device=features.device)

    def _without_padding(self, logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return (H, W) logits of SAM's input for the region of the image."""
        side = self.concept_model.config.sam_image_size
        height, width = self.concept_processor.valid_size(image_size)
        if (height, width) == (side, side):
            return logits.float()
        resized = nn.functional.interpolate(logits[None, None].float(), size=(side, side), mode="bilinear")
        return resized[0, 0, :height, :width]

    def after_rewards(self, inputs: Rows, completions: Sequence[Any], rewards: Tensor) -> None:
        """Log the IoU of masks, and store examples for the example images."""
        ious = []
        for row, rollout in zip(inputs, self._rollouts, strict=True):
            prompt = rollout.prompt
            ignore = None if prompt.ignore is None else prompt.ignore.cpu().numpy()
            ious.append(foreground_iou(row["predicted_mask"], prompt.mask.cpu().numpy(), ignore))
            self.log_rollout("mask_iou", ious[-1])
        if self.log_completions:
            self.log_column("mask_iou", ious)
        self._keep_examples(inputs, rewards.tolist())

    # -- the loss --

    def forward_arguments(self, inputs: Batch) -> dict[str, Any]:
        """Return the mask of completion tokens and SAM's features of the targets."""
        prompts = torch.zeros_like(inputs["prompt_mask"], dtype=torch.bool)
        features, sizes = self._features_of([rollout.prompt for rollout in inputs["rollouts"]])
        return {
            "position_mask": torch.cat([prompts, inputs["completion_mask"].bool()], dim=1),
            "sam_levels": features.levels,
            "valid_sizes": sizes,
        }

    def add_to_loss(self, policy_loss: Tensor, output: Any, inputs: Batch, steps: int) -> Tensor:
        """Add L_SEG (eq. 8), computed from prior and masks of the same forward pass."""
        rollouts = inputs["rollouts"]
        labels, ignore = self._labels([rollout.prompt for rollout in rollouts])
        # `mask_truncated_completions` masks all tokens of a truncated completion.
        included = output.has_position & inputs["completion_mask"].any(dim=1)
        losses = prior_losses(output.prior_logits, output.mask_logits, labels, ignore, included)
        dice_weight, focal_weight = self.mask_loss_weights()
        seg_loss = (
            self.args.prior_weight * losses.prior + dice_weight * losses.dice + focal_weight * losses.focal
        )
        # All trained modules take part in the backward pass, even if no completion is included.
        seg_loss = seg_loss + (output.prior_logits.sum() + output.mask_logits.sum()) * 0
        parts = {
            "grpo": policy_loss * steps,
            "seg": seg_loss,
            "prior": losses.prior,
            "dice": losses.dice,
            "focal": losses.focal,
        }
        for name, value in parts.items():
            self.log_mean(f"loss/{name}", value)
        loss = policy_loss + self.args.seg_loss_weight * seg_loss / steps
        self.check_loss(loss)
        return loss

    def mask_loss_weights(self) -> tuple[float, float]:
        """Return the weights of dice and focal loss in the current step."""
        args = self.args
        if self.state.global_step < args.switch_step:
            return args.first_dice_weight, args.first_focal_weight
        return args.dice_weight, args.focal_weight

    def _labels(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return (B, S, S) masks in the frame of SAM's input, and pixels to ignore, including padding."""
        processor, device = self.concept_processor, self.accelerator.device
        labels = torch.stack([processor.mask_to_sam(prompt.mask.cpu().numpy()) for prompt in prompts])
        sizes = torch.tensor([processor.valid_size(prompt.target.size) for prompt in prompts])
        ignore = padding_mask(sizes, processor.sam_image_size, processor.sam_image_size)[:, 0]
        for row, prompt in enumerate(prompts):
            if prompt.ignore is not None:
                ignore[row] |= processor.mask_to_sam(prompt.ignore.cpu().numpy())
        return labels.to(device), ignore.to(device)


class reference_vlm:  # noqa: N801 (a context manager)
    """Yield the VLM of the reference policy: a copy, or the VLM with its adapters disabled."""

    def __init__(self, trainer: CoPRSTrainer) -> None:
        self.trainer = trainer
        self._disabled: Any = None

    def __enter__(self) -> Any:
        trainer = self.trainer
        if trainer.ref_model is not None:
            return trainer.accelerator.unwrap_model(trainer.ref_model)
        self._disabled = trainer.accelerator.unwrap_model(trainer.model).disable_adapter()
        self._disabled.__enter__()
        return trainer.concept_model.vlm

    def __exit__(self, *error: Any) -> None:
        if self._disabled is not None:
            self._disabled.__exit__(*error)


def _first(encode: Callable[[list[Image.Image]], list[PriorFeatures]], image: Image.Image) -> PriorFeatures:
    return encode([image])[0]


def _copy_of_modules(model: CoPRSForSegmentation) -> CoPRSForSegmentation:
    """Return a frozen and unsharded copy of prior and mask decoder, without VLM and image encoder."""
    vlm, encoder = model._modules.pop("vlm"), model.sam.__dict__.pop("vision_encoder", None)
    module = model.sam._modules.pop("vision_encoder", None)
    try:
        copies: dict[
            int, Any
        ] = {}  # the memo of deepcopy: ZeRO-3 has sharded the parameters of a loaded model
        for parameter in model.parameters():
            if is_sharded(parameter):
                with gathered([parameter]):
                    copies[id(parameter)] = nn.Parameter(parameter.data.clone())
        copied = copy.deepcopy(model, copies)
    finally:
        model._modules["vlm"] = vlm
        if encoder is not None:
            model.sam.__dict__["vision_encoder"] = encoder
        if module is not None:
            model.sam._modules["vision_encoder"] = module
    return copied.requires_grad_(False)


__all__ = ["CoPRSTrainer"]
