"""A variant of stage II."""

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
