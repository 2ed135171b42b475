"""Settings of `CoPRSTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .grpo_config import SegmentationGRPOConfig
from .rewards import COPRS_REWARDS

_FINAL_DIVISION_FACTOR = 6.7  # appendix B.3


@dataclass
class CoPRSTrainerConfig(SegmentationGRPOConfig):
    """GRPO with segmentation supervision of CoPRS (eq. 4 to 8), with the values of appendix B.3 as defaults.

    This class includes all fields of `trl.GRPOConfig`: G 8, clip ratio 0.2, KL coefficient 0.2 (TRL uses the
    low-variance estimator of eq. 12), AdamW with weight decay 0.01, 31,250 steps of a one-cycle schedule without
    warm-up, gradient norm 1, 2,000 completion tokens, and the loss of the GRPO paper; and the fields below. The paper's
    batch of 16 prompts has 128 completions, such as 16 on each of 8 GPUs.

    > Parameters that control the data

        max_prompt_length: Maximum number of tokens of a prompt, including image tokens; longer prompts raise an error.
        image_features_dir: Folder in which SAM's image features are stored, so that an image is encoded once for all
            epochs and runs; None to encode images in each step.

    > Parameters that control the rewards

        rewards: Parts of the reward, `"mask"` and `"format"`; TRL's `reward_weights` are in the same order (0.7, 0.3).
        reward_masks: Modules that decode the mask of the mask reward: `"reference"`, the reference policy and a frozen
            copy of the initial modules (appendix B.1), or `"policy"`, the trained ones.
        sam_decode_batch_size: Batch size for encoding images and decoding masks for the rewards.

    > Parameters that control the loss

        seg_loss_weight: Weight of L_SEG (lambda_SEG in eq. 4).
        dice_weight: Weight of the dice loss (lambda_d in eq. 8) from step `switch_step` on.
        focal_weight: Weight of the focal loss (lambda_f in eq. 8) from step `switch_step` on.
        first_dice_weight: Weight of the dice loss before.
        first_focal_weight: Weight of the focal loss before.
        switch_step: Step from which the second weights are used.
        prior_weight: Weight of the cross-entropy of the prior; 0 is the ablation without prior loss.
        num_best_and_worst: See `MetaGRPOConfig`.

    > Parameters that control the models

        prior_rate: Learning rate of the modules of the prior, as a multiple of `learning_rate`.
        prompt_encoder_rate: Learning rate of SAM's prompt encoder, as a multiple.
        mask_decoder_rate: Learning rate of SAM's mask decoder, as a multiple.
        ref_model_name_or_path: CoPRS checkpoint of the reference policy; by default a copy of the model.
        freeze_vision_tower: Freeze the vision tower of the VLM.

    > Parameters that control the example images

        log_examples: Number of example images per log; 0 disables them.
        log_examples_steps: Number of steps between example images.
    """

    learning_rate: float = field(default=1.6e-6, metadata={"help": "Peak learning rate of the VLM."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    max_steps: int = field(default=31_250, metadata={"help": "Number of training steps."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "One cycle without warm-up (appendix B.3)."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"min_lr_rate": 1 / _FINAL_DIVISION_FACTOR},
        metadata={"help": "Arguments of the schedule."},
    )
    beta: float = field(default=0.2, metadata={"help": "Weight of the KL to the reference policy (eq. 7)."})
    max_completion_length: int | None = field(
        default=2000, metadata={"help": "Maximum tokens of a completion."}
    )
    max_prompt_length: int = field(default=1300, metadata={"help": "Maximum tokens of a prompt."})
    rewards: list[str] = field(
        default_factory=lambda: ["mask", "format"], metadata={"help": "Parts of the reward."}
    )
    reward_weights: list[float] | None = field(
        default_factory=lambda: [0.7, 0.3], metadata={"help": "Weights of the rewards."}
    )
    reward_masks: str = field(
        default="reference",
        metadata={"help": "Modules that decode the masks of the reward.", "choices": ["reference", "policy"]},
    )
    image_features_dir: str | None = field(default=None, metadata={"help": "Folder of SAM's image features."})
    seg_loss_weight: float = field(default=0.3, metadata={"help": "Weight of L_SEG (eq. 4)."})
    dice_weight: float = field(default=3.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=10.0, metadata={"help": "Weight of the focal loss."})
    first_dice_weight: float = field(default=1.5, metadata={"help": "Weight of the dice loss at the start."})
    first_focal_weight: float = field(
        default=0.0, metadata={"help": "Weight of the focal loss at the start."}
    )
    switch_step: int = field(default=1500, metadata={"help": "Step from which the later weights are used."})
    prior_weight: float = field(default=1.0, metadata={"help": "Weight of the prior's cross-entropy."})
    prior_rate: float = field(default=25.0, metadata={"help": "Multiple of the learning rate for the prior."})
    prompt_encoder_rate: float = field(
        default=10.0, metadata={"help": "Multiple of the learning rate for SAM's prompt encoder."}
    )
    mask_decoder_rate: float = field(
        default=5.0, metadata={"help": "Multiple of the learning rate for SAM's mask decoder."}
    )

    def _check_fields(self) -> None:
        super()._check_fields()
        unknown = [name for name in self.rewards if name not in COPRS_REWARDS]
        if unknown or not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(
                f"CoPRSTrainerConfig: rewards is {self.rewards}; use one or more of {', '.join(COPRS_REWARDS)}, each "
                "once."
            )
        if self.reward_masks not in ("reference", "policy"):
            raise ValueError(
                f"CoPRSTrainerConfig: reward_masks is {self.reward_masks!r}; use 'reference' or 'policy'."
            )
        if self.reward_masks == "reference" and not self.beta and "mask" in self.rewards:
            raise ValueError(
                "CoPRSTrainerConfig: reward_masks is 'reference', but beta is 0, so there is no reference policy; use "
                "reward_masks='policy', or a beta above 0."
            )
        for name in (
            "seg_loss_weight",
            "dice_weight",
            "focal_weight",
            "first_dice_weight",
            "first_focal_weight",
            "prior_weight",
            "switch_step",
            "prior_rate",
            "prompt_encoder_rate",
            "mask_decoder_rate",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"CoPRSTrainerConfig: {name} is {getattr(self, name)}; use 0 or more.")
        if self.use_vllm:
            raise ValueError(
                "CoPRSTrainerConfig: use_vllm is true, but CoPRS is not trained with vLLM; remove it."
            )
