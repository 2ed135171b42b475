"""The variants of stage II that are compared."""

from __future__ import annotations

from ...experiments.arms import Arm

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
