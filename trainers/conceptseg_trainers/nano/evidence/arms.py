"""The trained variants that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One variant of stage II.

    Attributes:
        title: Row of the tables.
        rewards: Parts of the reward; see `MetaGRPOConfig.rewards`. Empty: no reinforcement learning.
        prompted_by: What SAM 3 is prompted with in evaluations; see `ConceptSegForSegmentation.segment`.
        seg_loss_weight: Weight of L_seg (eq. 8).
        meta_reasoning: Whether completions contain `<rule>` and `<check>`.
        random_rewards: Rewards are drawn at random, which is the control.
        supervised: Train on ground-truth completions instead.
        new_ctm: Start from a newly initialized CTM (one-stage training).
    """

    title: str
    rewards: tuple[str, ...] = ()
    prompted_by: str = "concept+text"
    seg_loss_weight: float = 1.0
    meta_reasoning: bool = True
    random_rewards: bool = False
    supervised: bool = False
    new_ctm: bool = False


ARMS = {
    "box": Arm("GRPO, box prompt", ("format", "box"), prompted_by="box", seg_loss_weight=0.0),
    "ctm": Arm("GRPO, CTM, box reward", ("format", "mask", "box")),
    "meta": Arm("Meta-GRPO", ("format", "mask", "meta")),
    "no-meta-reward": Arm("Meta-GRPO without the meta reward", ("format", "mask")),
    "no-meta-reasoning": Arm(
        "Meta-GRPO without rule and check", ("format", "mask", "box"), meta_reasoning=False
    ),
    "one-stage": Arm("Meta-GRPO without stage I", ("format", "mask", "meta"), new_ctm=True),
    "random": Arm("random rewards (control)", ("format",), random_rewards=True),
    "sft": Arm("SFT with true labels (upper bound)", supervised=True),
}
"""The arms by name. All but "sft" see the same prompts and sample the same number of completions."""
