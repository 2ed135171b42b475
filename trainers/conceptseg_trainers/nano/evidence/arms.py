"""The variants of stage II that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A variant of stage II.

    Attributes:
        title: Name of its row in the tables.
        rewards: Parts of the reward; see `MetaGRPOConfig.rewards`. Not used with `random_rewards` or `supervised`.
        prompted_by: Prompt of SAM 3 in evaluations; see `sam_prompt` of `ConceptSegForSegmentation.segment`.
        seg_loss_weight: Weight of L_seg (eq. 8).
        meta_reasoning: Whether completions contain `<rule>` and `<check>`.
        random_rewards: Whether rewards are drawn at random (control) instead of being computed.
        supervised: Whether the VLM is trained on ground-truth completions instead of by reinforcement learning.
        new_ctm: Whether the training starts with a newly initialized CTM (without stage I).
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
    "sft": Arm("SFT on ground-truth completions (upper bound)", supervised=True),
}
"""The arms by name. All arms except "sft" use the same prompts and sample the same number of completions."""

COMPARED_ARMS = (
    ("meta", "ctm"),
    ("meta", "no-meta-reward"),
    ("meta", "no-meta-reasoning"),
    ("meta", "one-stage"),
    ("meta", "random"),
    ("ctm", "box"),
)
"""Pairs of arms whose difference is one component of the method."""
