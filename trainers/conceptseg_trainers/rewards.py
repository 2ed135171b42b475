"""Rewards of Meta-GRPO (eq. 2 and 6): pure functions of completions and dataset columns for any `trl.GRPOTrainer`.

TRL logs a reward with the `__name__` of its function, e.g. `rewards/format/mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from conceptseg_hf import Completion, parse_completion
from conceptseg_hf.boxes import box_iou
from conceptseg_hf.coprs.completion import format_score
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.images import load_mask

Completions: TypeAlias = Sequence[str | Sequence[dict[str, Any]]]

WITHOUT_PROXY = ("none", "box", "square")


def format_reward(
    completions: Completions,
    gt_check_box: Sequence[Sequence[float] | None] | None = None,
    meta_reasoning: bool = True,
    **columns: Any,
) -> list[float]:
    """Compute R_format of eq. 6: 1 if the completion follows the template, otherwise 0.

    Args:
        completions: Strings, or conversations with one assistant message.
        gt_check_box: Withheld box of the proxy query, or None for prompts without a proxy query. `<check>` is required
            in the first case and not allowed in the second. If the column is missing, `<check>` is optional.
        meta_reasoning: False for the ablation without meta reasoning: neither `<rule>` nor `<check>` is allowed.
        **columns: Ignored.

    Example:
        >>> text = "<think>a</think><rule>b</rule><bbox>[0,0,5,5]</bbox><answer>star</answer>"
        >>> format_reward([text, "star"])
        [1.0, 0.0]
    """
    checks = [None] * len(completions) if gt_check_box is None else [box is not None for box in gt_check_box]
    return [
        float(_parse(completion, expect_check if meta_reasoning else False, meta_reasoning).is_valid)
        for completion, expect_check in zip(completions, checks, strict=True)
    ]


def mask_reward(
    completions: Completions,
    predicted_mask: Sequence[np.ndarray] | None = None,
    gt_mask: Sequence[Any] | None = None,
    ignore_mask: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """Compute R_mask of eq. 6: foreground IoU of the mask that SAM 3 decodes from a completion with the ground truth.

    Args:
        completions: Only their number is used.
        predicted_mask: (H, W) bool per completion; `MetaGRPOTrainer` adds this column.
        gt_mask: Ground-truth masks of the same sizes: images or arrays, see `images.load_mask`.
        ignore_mask: Masks of the pixels to ignore, in the same format, or None.
        **columns: Ignored.

    Returns:
        IoU per completion; 1 if both masks are empty.

    Raises:
        ValueError: If a column is missing.
    """
    if predicted_mask is None or gt_mask is None:
        raise ValueError(
            "mask_reward: the column predicted_mask or gt_mask is missing; use MetaGRPOTrainer, which adds "
            "predicted_mask, and a dataset with gt_mask."
        )
    ignored = [None] * len(completions) if ignore_mask is None else ignore_mask
    return [
        foreground_iou(
            np.asarray(prediction, dtype=bool),
            load_mask(ground_truth),
            None if ignore is None else load_mask(ignore),
        )
        for _, prediction, ground_truth, ignore in zip(
            completions, predicted_mask, gt_mask, ignored, strict=True
        )
    ]


def meta_reward(
    completions: Completions,
    gt_box: Sequence[Sequence[float] | None],
    gt_check_box: Sequence[Sequence[float] | None] | None = None,
    without_proxy: str = "none",
    **columns: Any,
) -> list[float | None]:
    """Compute R_meta of eq. 2: IoU(bbox, GT box) * IoU(check, GT check box).

    Boxes are in text units and are not clipped: any part outside of the image reduces the IoU. A missing or malformed
    box has an IoU of 0.

    Args:
        completions: Strings, or conversations with one assistant message.
        gt_box: Ground-truth box in text units; None if the concept is absent, for which an empty box is correct.
        gt_check_box: Withheld box of the proxy query in text units, or several boxes, of which the one with the largest
            IoU is used; None without a proxy query.
        without_proxy: Reward without a proxy query, for which eq. 2 is not defined. `"none"`: None, which TRL excludes
            from the mean. `"box"`: IoU(bbox, GT box). `"square"`: IoU(bbox, GT box)^2, as in the released code.
        **columns: Ignored.

    Raises:
        ValueError: If `without_proxy` has another value.
    """
    if without_proxy not in WITHOUT_PROXY:
        raise ValueError(
            f"meta_reward: without_proxy is {without_proxy!r}; use one of {', '.join(WITHOUT_PROXY)}."
        )
    checks = [None] * len(completions) if gt_check_box is None else gt_check_box
    rewards: list[float | None] = []
    for completion, box, check in zip(completions, gt_box, checks, strict=True):
        parsed = _parse(completion)
        iou = box_iou_or_zero(parsed.bbox, box)
        if check is not None:
            rewards.append(iou * box_iou_or_zero(parsed.check, check))
        else:
            rewards.append({"none": None, "box": iou, "square": iou**2}[without_proxy])
    return rewards


def box_reward(
    completions: Completions, gt_box: Sequence[Sequence[float] | None], **columns: Any
) -> list[float]:
    """Compute IoU(bbox, GT box), which replaces R_meta in the ablation without the meta reward.

    Args:
        completions: Strings, or conversations with one assistant message.
        gt_box: As in `meta_reward`.
        **columns: Ignored.
    """
    return [
        box_iou_or_zero(_parse(completion).bbox, box)
        for completion, box in zip(completions, gt_box, strict=True)
    ]


def position_format_reward(completions: Completions, **columns: Any) -> list[float]:
    """Score the format of CoPRS completions: 0, 0.9 or 1; see `coprs.completion.format_score` (appendix B.2).

    Args:
        completions: Strings, or conversations with one assistant message.
        **columns: Ignored.

    Example:
        >>> position_format_reward(["<think>a</think><REF_POS>", "see <think>a</think><REF_POS>", "<REF_POS>"])
        [1.0, 0.9, 0.0]
    """
    return [format_score(completion_text(completion)) for completion in completions]


def soft_mask_reward(
    completions: Completions,
    predicted_probability: Sequence[np.ndarray] | None = None,
    gt_mask: Sequence[Any] | None = None,
    ignore_mask: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """Compute the mask reward of CoPRS: 0.5 soft IoU + 0.2 soft dice + 0.3 hard IoU (appendix B.2).

    Args:
        completions: Only their number is used.
        predicted_probability: (H, W) mask probabilities per completion; `CoPRSTrainer` adds this column. All zeros if
            the completion has no concentration token.
        gt_mask: Ground-truth masks of the same sizes: images or arrays, see `images.load_mask`.
        ignore_mask: Masks of the pixels to ignore, in the same format, or None.
        **columns: Ignored.

    Returns:
        A score in [0, 1] per completion; 1 if both masks are empty.

    Raises:
        ValueError: If a column is missing.
    """
    if predicted_probability is None or gt_mask is None:
        raise ValueError(
            "soft_mask_reward: the column predicted_probability or gt_mask is missing; use CoPRSTrainer, which adds "
            "predicted_probability, and a dataset with gt_mask."
        )
    ignored = [None] * len(completions) if ignore_mask is None else ignore_mask
    rewards = []
    for probability, ground_truth, ignore in zip(predicted_probability, gt_mask, ignored, strict=True):
        truth = load_mask(ground_truth)
        valid = np.ones_like(truth) if ignore is None else ~load_mask(ignore)
        predicted, expected = (
            np.asarray(probability, dtype=np.float64)[valid],
            truth[valid].astype(np.float64),
        )
        overlap, total = float((predicted * expected).sum()), float(predicted.sum() + expected.sum())
        soft_iou = overlap / (total - overlap) if total > overlap else 1.0
        soft_dice = 2 * overlap / total if total else 1.0
        hard = predicted > 0.5
        union = float((hard | (expected > 0)).sum())
        hard_iou = float((hard & (expected > 0)).sum()) / union if union else 1.0
        rewards.append(0.5 * soft_iou + 0.2 * soft_dice + 0.3 * hard_iou)
    return rewards


def box_iou_or_zero(
    box: Sequence[float] | None, ground_truth: Sequence[float] | Sequence[Sequence[float]] | None
) -> float:
    """Return the IoU of a box with the ground truth, or the largest IoU with several boxes, all in text units.

    The result is 0 if the box is missing. If there is nothing to locate (`ground_truth` is None), it is 1 for an empty
    box and 0 otherwise.
    """
    if box is None:
        return 0.0
    if ground_truth is None:
        return float(box[0] == box[2] or box[1] == box[3])
    if boxes := [item for item in ground_truth if isinstance(item, Sequence)]:
        return max(box_iou(box, gt_box) for gt_box in boxes)
    return box_iou(box, [value for value in ground_truth if not isinstance(value, Sequence)])


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return the text of a completion: a string, or a conversation with one assistant message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, list):  # structured content
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _parse(
    completion: str | Sequence[dict[str, Any]], expect_check: bool | None = None, expect_rule: bool = True
) -> Completion:
    return parse_completion(completion_text(completion), expect_check=expect_check, expect_rule=expect_rule)


Reward: TypeAlias = Callable[..., Sequence[float | None]]

REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "mask": mask_reward,
    "meta": meta_reward,
    "box": box_reward,
}
"""Rewards by the names that are used in logs and in `MetaGRPOConfig.rewards`."""

COPRS_REWARDS: dict[str, Reward] = {"mask": soft_mask_reward, "format": position_format_reward}
"""Rewards of CoPRS by the names that are used in logs and in `CoPRSTrainerConfig.rewards`."""

for _name, _reward in (*REWARDS.items(), *COPRS_REWARDS.items()):
    _reward.__name__ = _name
