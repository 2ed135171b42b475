"""The rewards of Meta-GRPO (eq. 2 and 6): pure functions of completions and columns, for any `trl.GRPOTrainer`.

TRL logs a reward under its function's `__name__`: `rewards/format/mean` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from conceptseg_hf import Completion, parse_completion
from conceptseg_hf.boxes import box_iou
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.images import load_mask

Completions: TypeAlias = Sequence[str | Sequence[dict[str, Any]]]

WITHOUT_PROXY = ("none", "box", "square")


def format_reward(
    completions: Completions, gt_check_box: Sequence[Sequence[float] | None] | None = None, **columns: Any
) -> list[float]:
    """R_format of eq. 6: 1 if the completion has the form of the template, else 0.

    Args:
        completions: Texts, or conversations of one assistant message.
        gt_check_box: The withheld box of each prompt's proxy query, or None where there is none: `<check>` must be
            there in the first case and must not in the second. Without the column both will do.
        **columns: Ignored.

    Example:
        >>> text = "<think>a</think><rule>b</rule><bbox>[0,0,5,5]</bbox><answer>star</answer>"
        >>> format_reward([text, "star"])
        [1.0, 0.0]
    """
    checks = [None] * len(completions) if gt_check_box is None else [box is not None for box in gt_check_box]
    return [
        float(_parse(completion, expect_check).is_valid)
        for completion, expect_check in zip(completions, checks, strict=True)
    ]


def mask_reward(
    completions: Completions,
    predicted_mask: Sequence[np.ndarray] | None = None,
    gt_mask: Sequence[Any] | None = None,
    ignore_mask: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """R_mask of eq. 6: foreground IoU of the mask that SAM 3 decodes from this completion with the true mask.

    Args:
        completions: Their number alone counts.
        predicted_mask: (H, W) bool per completion; `MetaGRPOTrainer` adds this column.
        gt_mask: True masks of the same sizes: images or arrays, see `images.load_mask`.
        ignore_mask: Pixels that do not count, as such masks, or None where all do.
        **columns: Ignored.

    Returns:
        1 where both masks are empty.

    Raises:
        ValueError: If a column is missing.
    """
    if predicted_mask is None or gt_mask is None:
        raise ValueError(
            "mask_reward: the column predicted_mask or gt_mask is missing; train with MetaGRPOTrainer, which decodes "
            "the masks, on a data set that has gt_mask."
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
    """R_meta of eq. 2: IoU(bbox, GT box) * IoU(check, GT check box).

    Boxes are taken as written, in text units: the part of a box outside of the image counts against it. A missing or
    malformed box has an IoU of 0.

    Args:
        completions: Texts, or conversations of one assistant message.
        gt_box: The true box in text units; None where the concept is absent, whose right answer is an empty box.
        gt_check_box: The withheld box of the proxy query in text units, or several, of which the best counts; None
            where there is none.
        without_proxy: What the reward is where there is no proxy query. `"none"`: no reward, as eq. 2 has none; TRL
            leaves these completions out of the mean. `"box"`: IoU(bbox, GT box). `"square"`: its square, as in the
            released code.
        **columns: Ignored.

    Raises:
        ValueError: If `without_proxy` is not one of these.
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
    """IoU(bbox, GT box) alone: what stands in for R_meta in the ablation without meta reward.

    Args:
        completions: Texts, or conversations of one assistant message.
        gt_box: As in `meta_reward`.
        **columns: Ignored.
    """
    return [
        box_iou_or_zero(_parse(completion).bbox, box)
        for completion, box in zip(completions, gt_box, strict=True)
    ]


def box_iou_or_zero(
    box: Sequence[float] | None, ground_truth: Sequence[float] | Sequence[Sequence[float]] | None
) -> float:
    """IoU of a box with the true one, or the best with several, all in text units; a missing box scores 0.

    Where there is nothing to locate (`truth` is None), an empty box is right.
    """
    if box is None:
        return 0.0
    if ground_truth is None:
        return float(box[0] == box[2] or box[1] == box[3])
    if several := [one for one in ground_truth if isinstance(one, Sequence)]:
        return max(box_iou(box, one) for one in several)
    return box_iou(box, [side for side in ground_truth if not isinstance(side, Sequence)])


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion, which TRL gives as a string or as a conversation of one assistant message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, list):  # structured content
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _parse(completion: str | Sequence[dict[str, Any]], expect_check: bool | None = None) -> Completion:
    return parse_completion(completion_text(completion), expect_check=expect_check)


Reward: TypeAlias = Callable[..., Sequence[float | None]]

REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "mask": mask_reward,
    "meta": meta_reward,
    "box": box_reward,
}
"""The rewards by the names under which they are logged and `MetaGRPOConfig.rewards` asks for them."""

for _name, _reward in REWARDS.items():
    _reward.__name__ = _name
