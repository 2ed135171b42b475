"""Settings of stage II."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from trl import GRPOConfig

from .rewards import REWARDS, WITHOUT_PROXY

_UNSUPPORTED = {
    "sync_ref_model": "the reference policy of Meta-GRPO is fixed",
    "cast_lm_head_to_fp32": "TRL expects the head on the model itself, not on its VLM",
    "remove_unused_columns": "SAM 3 and the rewards need columns that the VLM does not use",
    "dataloader_persistent_workers": "persistent workers would keep the mosaics of the first epoch",
}


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Temporarily suppress the deprecation warnings for the old name of activation checkpointing, which TRL uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


@dataclass
class MetaGRPOConfig(GRPOConfig):
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
    loss_type: str = field(default="grpo", metadata={"help": "See trl.GRPOConfig."})
    # Images would be pickled across processes in every generation.
    log_multimodal: bool = field(
        default=False, metadata={"help": "Log images with the completions; slow with several processes."}
    )

    max_prompt_length: int = field(default=2048, metadata={"help": "Maximum tokens of a prompt."})
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
    sam_decode_batch_size: int = field(default=8, metadata={"help": "Batch size for decoding masks."})
    seg_loss_weight: float = field(default=1.0, metadata={"help": "Weight of L_seg (eq. 8)."})
    detach_hidden_states: bool = field(
        default=False, metadata={"help": "Stop the gradient of L_seg at the CTM's input."}
    )
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=1.0, metadata={"help": "Weight of the focal loss."})
    focal_alpha: float = field(default=0.25, metadata={"help": "Foreground weight of the focal loss."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Focusing parameter of the focal loss."})
    num_best_and_worst: int | None = field(
        default=None,
        metadata={"help": "Number of best and of worst completions per group to train on; all by default."},
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of the reference policy."}
    )
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Freeze the vision tower."})
    vllm_vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "VLM from which the vLLM engine is built.",
            "aliases": ["--vllm_mllm_name_or_path"],  # previous name
        },
    )
    log_examples: int = field(default=4, metadata={"help": "Example images per log; 0 for none."})
    log_examples_steps: int = field(default=50, metadata={"help": "Steps between example images."})

    def __post_init__(self) -> None:
        self._check_fields()
        try:
            with without_renaming_warnings():
                super().__post_init__()
        except ValueError as error:
            group_size = self.num_generations
            if self.generation_batch_size and group_size and self.generation_batch_size % group_size:
                raise ValueError(
                    f"MetaGRPOConfig: a generation batch of {self.generation_batch_size} completions "
                    "(per_device_train_batch_size x processes x steps_per_generation) does not consist of whole groups "
                    f"of num_generations = {group_size}; make it a multiple of num_generations."
                ) from error
            raise
        self._check_groups()

    def _check_groups(self) -> None:
        """Check that the selected completions fill whole batches on each process."""
        count = self.num_best_and_worst
        if count is None:
            return
        # GRPOConfig sets both, although their types are optional.
        group_size, steps = cast(int, self.num_generations), cast(int, self.steps_per_generation)
        if not 1 <= count <= group_size // 2:
            raise ValueError(
                f"MetaGRPOConfig: num_best_and_worst is {count}; use 1 to {group_size // 2} (half of "
                f"num_generations)."
            )
        num_completions = self.per_device_train_batch_size * steps
        if num_completions % group_size or self.per_device_train_batch_size * 2 * count % group_size:
            raise ValueError(
                f"MetaGRPOConfig: num_best_and_worst = {count} does not select a whole number of the "
                f"{self.per_device_train_batch_size} completions per device from groups of {group_size}; make "
                "per_device_train_batch_size a multiple of num_generations."
            )

    def _check_fields(self) -> None:
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
        for name in ("max_prompt_length", "sam_decode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"MetaGRPOConfig: {name} is {getattr(self, name)}; use at least 1.")
        for name in (
            "seg_loss_weight",
            "dice_weight",
            "focal_weight",
            "focal_gamma",
            "log_examples",
            "log_examples_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"MetaGRPOConfig: {name} is {getattr(self, name)}; use 0 or more.")
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"MetaGRPOConfig: {name} is true, but {reason}; remove it.")
        if self.use_vllm and not self.vllm_vlm_name_or_path:
            raise ValueError(
                "MetaGRPOConfig: use_vllm is true without vllm_vlm_name_or_path; set it to the VLM from which the "
                "engine is built."
            )
