"""The settings of stage II."""

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
    "cast_lm_head_to_fp32": "TRL looks for the head on the model itself, not on its VLM",
    "remove_unused_columns": "SAM 3 and the rewards need columns that the VLM does not",
    "dataloader_persistent_workers": "workers that outlive an epoch would go on with its mosaics",
}


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """A block in which TRL may call activation checkpointing by its old name without a warning each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


@dataclass
class MetaGRPOConfig(GRPOConfig):
    """Stage II of the paper: Meta-GRPO on the VLM and the CTM (eq. 6, 7 and 8).

    The fields of `trl.GRPOConfig`, with the defaults of Table 7 (2 epochs at 1e-6, linear, AdamW, seed 42; G 8; beta
    0.04; 768 completion tokens; batch 64, which is 8 completions on each of 8 GPUs) and the loss of GRPO's own paper
    (`loss_type="grpo"`), and these:

    > Parameters that control the data

        max_prompt_length: Tokens of a prompt, images included (Table 7); a longer one is refused.

    > Parameters that control the rewards

        rewards: The parts of the reward (eq. 6), of `"format"`, `"mask"`, `"meta"` and `"box"`; TRL's
            `reward_weights` weighs them in this order. `"box"` in the place of `"meta"` is the ablation without meta
            reward.
        meta_without_proxy: R_meta where there is no proxy query. `"none"`: no reward, as eq. 2 has none; `"square"`:
            IoU(bbox)^2, as in the released code; `"box"`: IoU(bbox).
        sam_decode_batch_size: Masks that SAM 3 decodes, and images it encodes, at a time.

    > Parameters that control the loss

        seg_loss_weight: Weight of L_seg in eq. 8: 1 in the paper, 0.01 in the released code.
        detach_hidden_states: Stop the gradient of L_seg at the CTM's input, as the released code does; in the paper
            it reaches the VLM.
        dice_weight: Weight of the dice loss in L_seg (eq. 5).
        focal_weight: Weight of the focal loss in L_seg.
        focal_alpha: Its weight of foreground pixels; negative: none.
        focal_gamma: Its discount of well-classified pixels. `focal_alpha=-1, focal_gamma=0` is the released code's
            binary cross-entropy.

        num_best_and_worst: Train on this many of the best and as many of the worst completions of each group alone, by
            their advantage; all completions are sampled and rewarded. None: on all, as in the paper. Speeds up a step
            with large groups, whose middle carries little signal.

    > Parameters that control the models

        ref_model_name_or_path: A ConceptSeg checkpoint whose VLM is the reference policy; by default the model as
            it is given to the trainer. Needed when a run goes on with a model that was trained before.
        freeze_vision_tower: Leave the VLM's vision tower as it is; the paper trains all of the VLM.
        vllm_vlm_name_or_path: With `use_vllm`, the folder or id of the plain VLM that a colocated engine starts
            from.

    > Parameters that control the example pictures

        log_examples: Pictures at a time; 0 for none.
        log_examples_steps: Steps between pictures.
    """

    # Table 7.
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=2, metadata={"help": "Passes over the data."})
    max_completion_length: int | None = field(default=768, metadata={"help": "Tokens of a completion."})
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL to the reference policy (eq. 7)."})
    loss_type: str = field(default="grpo", metadata={"help": "See trl.GRPOConfig."})
    # Pictures would be pickled across processes at every generation.
    log_multimodal: bool = field(
        default=False, metadata={"help": "Log images beside completions; slow across processes."}
    )

    max_prompt_length: int = field(default=2048, metadata={"help": "Tokens of a prompt; longer is refused."})
    rewards: list[str] = field(
        default_factory=lambda: ["format", "mask", "meta"], metadata={"help": "Parts of the reward (eq. 6)."}
    )
    meta_without_proxy: str = field(
        default="none",
        metadata={"help": "R_meta where there is no proxy query.", "choices": list(WITHOUT_PROXY)},
    )
    sam_decode_batch_size: int = field(default=8, metadata={"help": "Masks that SAM 3 decodes at a time."})
    seg_loss_weight: float = field(default=1.0, metadata={"help": "Weight of L_seg (eq. 8)."})
    detach_hidden_states: bool = field(
        default=False, metadata={"help": "Stop the gradient of L_seg at the CTM's input."}
    )
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    focal_weight: float = field(default=1.0, metadata={"help": "Weight of the focal loss."})
    focal_alpha: float = field(default=0.25, metadata={"help": "Focal loss: weight of the foreground."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Focal loss: discount of easy pixels."})
    num_best_and_worst: int | None = field(
        default=None,
        metadata={"help": "Train on so many of the best and of the worst of each group; all by default."},
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint of the reference policy."}
    )
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    vllm_vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Plain VLM that a vLLM engine starts from.",
            "aliases": ["--vllm_mllm_name_or_path"],  # its name before
        },
    )
    log_examples: int = field(default=4, metadata={"help": "Example pictures at a time; 0 for none."})
    log_examples_steps: int = field(default=50, metadata={"help": "Steps between example pictures."})

    def __post_init__(self) -> None:
        self._check_fields()
        try:
            with without_renaming_warnings():
                super().__post_init__()
        except ValueError as error:
            group_size = self.num_generations
            if self.generation_batch_size and group_size and self.generation_batch_size % group_size:
                raise ValueError(
                    f"MetaGRPOConfig: {self.generation_batch_size} completions at a time "
                    "(per_device_train_batch_size x processes x steps_per_generation) do not make whole groups of "
                    f"num_generations = {group_size}; make them a multiple of it."
                ) from error
            raise
        self._check_groups()

    def _check_groups(self) -> None:
        """What is trained on must make whole batches on each process."""
        count = self.num_best_and_worst
        if count is None:
            return
        # GRPOConfig has filled in both, although their types admit None.
        group_size, steps = cast(int, self.num_generations), cast(int, self.steps_per_generation)
        if not 1 <= count <= group_size // 2:
            raise ValueError(
                f"MetaGRPOConfig: num_best_and_worst is {count}; use 1 to {group_size // 2}, half of "
                f"num_generations."
            )
        on_process = self.per_device_train_batch_size * steps
        if on_process % group_size or self.per_device_train_batch_size * 2 * count % group_size:
            raise ValueError(
                f"MetaGRPOConfig: of {self.per_device_train_batch_size} completions per device, num_best_and_worst = "
                f"{count} of groups of {group_size} leaves no whole number in each batch; make "
                "per_device_train_batch_size a multiple of num_generations."
            )

    def _check_fields(self) -> None:
        unknown = [name for name in self.rewards if name not in REWARDS]
        if unknown or not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(
                f"MetaGRPOConfig: rewards is {self.rewards}; name some of {', '.join(REWARDS)}, each once."
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
                raise ValueError(f"MetaGRPOConfig: {name} is true, but {reason}; leave it out.")
        if self.use_vllm and not self.vllm_vlm_name_or_path:
            raise ValueError(
                "MetaGRPOConfig: use_vllm is true without vllm_vlm_name_or_path; name the plain VLM that the engine "
                "starts from."
            )
