"""Settings of stage II."""

from __future__ import annotations

from dataclasses import dataclass, field

from .grpo_config import SegmentationGRPOConfig, without_renaming_warnings
from .rewards import REWARDS, WITHOUT_PROXY


@dataclass
class MetaGRPOConfig(SegmentationGRPOConfig):
    """Stage II of the paper: Meta-GRPO on the VLM and the CTM (eq. 6, 7 and 8).

    This class includes all fields of `trl.GRPOConfig`, with the defaults of Table 7 (2 epochs, learning rate 1e-6,
    linear schedule, AdamW, seed 42, G 8, beta 0.04, 768 completion tokens, batch size 64, i.e. 8 completions on each of
    8 GPUs) and the loss of the GRPO paper (`loss_type="grpo"`), and the fields below.

    > Parameters that control the data

        max_prompt_length: Maximum number of tokens of a prompt, including image tokens (Table 7); longer prompts raise
            an error.

    > Parameters that control the rewards

        rewards: Parts of the reward (eq. 6): `"format"`, `"mask"`, `"meta"` or `"box"`. TRL's `reward_weights` are in
            the same order. `"box"` instead of `"meta"` is the ablation without the meta reward.
        meta_without_proxy: R_meta if there is no proxy query, for which eq. 2 is not defined. `"none"`: no reward;
            `"square"`: IoU(bbox)^2, as in the released code; `"box"`: IoU(bbox).
        meta_reasoning: Whether completions contain `<rule>` and `<check>`. False for the ablation without meta
            reasoning, which needs a processor whose prompt template does not ask for them, such as
            `prompt_template.TEMPLATE_WITHOUT_META_REASONING`.
        sam_decode_batch_size: Batch size for decoding masks and encoding images with SAM 3.

    > Parameters that control the loss

        seg_loss_weight: Weight of L_seg in eq. 8: 1 in the paper, 0.01 in the released code.
        detach_hidden_states: Stop the gradient of L_seg at the input of the CTM, as in the released code; in the paper
            it is backpropagated to the VLM.
        dice_weight: Weight of the dice loss in L_seg (eq. 5).
        focal_weight: Weight of the focal loss in L_seg.
        focal_alpha: Weight of foreground pixels in the focal loss; a negative value disables the weighting.
        focal_gamma: Focusing parameter of the focal loss. `focal_alpha=-1, focal_gamma=0` is the binary cross-entropy
            of the released code.
        num_best_and_worst: Train only on this number of completions with the largest and with the smallest advantage in
            each group; all completions are sampled and rewarded. None trains on all, as in the paper. This speeds up
            steps with large groups, in which intermediate completions carry little signal.

    > Parameters that control the models

        ref_model_name_or_path: ConceptSeg checkpoint of which the VLM is the reference policy; by default a copy of
            the model that is passed to the trainer. Needed to continue training a model with its original reference.
        freeze_vision_tower: Freeze the vision tower of the VLM; the paper trains the full VLM.
        vllm_vlm_name_or_path: Folder or id of the VLM alone, from which `use_vllm` builds a colocated engine.

    > Parameters that control the example images

        log_examples: Number of example images per log; 0 disables them.
        log_examples_steps: Number of steps between example images.
    """

    # Table 7.
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=2, metadata={"help": "Number of training epochs."})
    max_completion_length: int | None = field(
        default=768, metadata={"help": "Maximum tokens of a completion."}
    )
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL to the reference policy (eq. 7)."})
    rewards: list[str] = field(
        default_factory=lambda: ["format", "mask", "meta"], metadata={"help": "Parts of the reward (eq. 6)."}
    )
    meta_without_proxy: str = field(
        default="none",
        metadata={"help": "R_meta without a proxy query.", "choices": list(WITHOUT_PROXY)},
    )
    meta_reasoning: bool = field(
        default=True, metadata={"help": "Whether completions contain <rule> and <check>."}
    )
    seg_loss_weight: float = field(default=1.0, metadata={"help": "Weight of L_seg (eq. 8)."})
    detach_hidden_states: bool = field(
        default=False, metadata={"help": "Stop the gradient of L_seg at the CTM's input."}
    )
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=1.0, metadata={"help": "Weight of the focal loss."})
    focal_alpha: float = field(default=0.25, metadata={"help": "Foreground weight of the focal loss."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Focusing parameter of the focal loss."})
    vllm_vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "VLM from which the vLLM engine is built.",
            "aliases": ["--vllm_mllm_name_or_path"],  # previous name
        },
    )

    def _check_fields(self) -> None:
        super()._check_fields()
        unknown = [name for name in self.rewards if name not in REWARDS]
        if unknown or not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(
                f"MetaGRPOConfig: rewards is {self.rewards}; use one or more of {', '.join(REWARDS)}, each once."
            )
        if "meta" in self.rewards and not self.meta_reasoning:
            raise ValueError(
                "MetaGRPOConfig: rewards contains 'meta', which compares `<check>`, but meta_reasoning is false; use "
                "'box' instead of 'meta'."
            )
        if self.meta_without_proxy not in WITHOUT_PROXY:
            raise ValueError(
                f"MetaGRPOConfig: meta_without_proxy is {self.meta_without_proxy!r}; use one of "
                f"{', '.join(WITHOUT_PROXY)}."
            )
        for name in (
            "seg_loss_weight",
            "dice_weight",
            "focal_weight",
            "focal_gamma",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"MetaGRPOConfig: {name} is {getattr(self, name)}; use 0 or more.")
        if self.use_vllm and not self.vllm_vlm_name_or_path:
            raise ValueError(
                "MetaGRPOConfig: use_vllm is true without vllm_vlm_name_or_path; set it to the VLM from which the "
                "engine is built."
            )


__all__ = ["MetaGRPOConfig", "without_renaming_warnings"]
