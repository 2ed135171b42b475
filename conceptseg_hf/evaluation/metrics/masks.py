"""Metrics of masks as pure functions, and `MaskMetrics`, which accumulates them.

Masks are bool arrays of shape (H, W). A ratio with a denominator of 0, such as the IoU of an empty prediction and an
empty ground truth, counts as perfect. The exception is F_w, which is 0 for an empty ground truth, as in PySODMetrics.
Metrics are named as in the paper (appendix E): mIoU averages foreground and background, gIoU is the mean foreground IoU
of the images, cIoU pools intersections and unions over all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...boxes import box_iou, foreground_iou
from ...images import load_gray_mask, load_mask
from ...suggestions import did_you_mean
from .protocols import get_protocol
from .s_measure import load_library, s_measure
from .weighted_f import load_ndimage, weighted_f_measure

METRICS = ("miou", "giou", "ciou", "mae", "ber", "mdice")
# These need SciPy and pysodmetrics: pip install conceptseg-hf[eval].
LIBRARY_METRICS = ("f_w", "s_measure")


def presence_auc(scores: Sequence[float], present: Sequence[bool]) -> float | None:
    """Compute the area under the ROC curve: the probability that a positive sample scores above a negative one.

    Ties count half.

    Args:
        scores: Presence scores, on any monotone scale.
        present: Whether the concept is present in each sample.

    Returns:
        A number in [0, 1]; None unless there are both positive and negative samples.

    Raises:
        ValueError: If the lengths differ.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(present, dtype=bool)
    if values.shape != labels.shape:
        raise ValueError(
            f"presence_auc: got {len(values)} scores for {len(labels)} labels; give one score per label."
        )
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # 1-based rank of each distinct score; ties have their mean rank.
    ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = ranks[inverse][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


class MaskMetrics:
    """Accumulates the metrics of masks, image by image.

    Sums are exactly rounded (`math.fsum`), so the result does not depend on the order of the images or on their
    distribution over batches and processes.

    Args:
        protocol: `"standard"`, `"paper"` or `"released"`; see `protocols`.
        ignore_index: Label of the pixels to ignore, or None.
        metrics: Names of metrics, from `METRICS` and `LIBRARY_METRICS`.

    Raises:
        ValueError: If the protocol or a metric is unknown.
        ImportError: If a metric needs a package that is not installed.
    """

    def __init__(
        self, protocol: str = "standard", ignore_index: int | None = 255, metrics: Sequence[str] = METRICS
    ) -> None:
        known = (*METRICS, *LIBRARY_METRICS)
        unknown = [name for name in metrics if name not in known]
        if unknown:
            raise ValueError(
                f"MaskMetrics: no metric is named {unknown[0]!r}{did_you_mean(unknown[0], known)}; use some of "
                f"{', '.join(known)}."
            )
        self.protocol, self.ignore_index, self.metrics = get_protocol(protocol), ignore_index, tuple(metrics)
        self.scores: list[Mapping[str, float]] = []
        if "f_w" in metrics:
            load_ndimage()
        if "s_measure" in metrics:
            load_library()

    def update(
        self, prediction: Any, ground_truth: Any, ignore: Any = None, own_size: bool = False
    ) -> dict[str, float]:
        """Score one image.

        Args:
            prediction: One of the `predictions` of `score_masks`.
            ground_truth: One of the `ground_truths` of `score_masks`.
            ignore: Pixels to ignore in addition to those labeled `ignore_index`; a bool array or a PIL mask of the
                ground truth's size.
            own_size: Compare at the size of the ground truth instead of the protocol's size; see `Protocol.own_size`.

        Returns:
            The entry that was added to `scores`.
        """
        index = len(self.scores)
        is_image = isinstance(ground_truth, Image.Image)
        soft_mask = load_gray_mask(ground_truth) if is_image and self.protocol.bicubic_ground_truths else None
        ground_truth, valid = _as_ground_truth(ground_truth, self.ignore_index, index)
        if ignore is not None:
            ignored = _as_probability(ignore, index)
            if ignored.shape != ground_truth.shape:
                raise ValueError(
                    f"score_masks: the ignore mask of image {index} has shape {ignored.shape}, but its ground truth "
                    f"has shape {ground_truth.shape}; resize the ignore mask to the size of the ground truth."
                )
            valid = valid & ~(ignored > 0.5)
        keep_size = own_size or ignore is not None or not valid.all()
        probability = _as_probability(prediction, index)
        is_resized = not keep_size and self.protocol.size is not None
        if probability.shape != ground_truth.shape and not is_resized:
            raise ValueError(
                f"score_masks: prediction {index} has shape {probability.shape}, but its ground truth has shape "
                f"{ground_truth.shape}; resize the prediction to the size of the ground truth."
            )
        probability, ground_truth, valid = self.protocol.prepare(
            probability, ground_truth, valid, keep_size, soft_mask if is_resized else None
        )
        if not valid.all():
            probability, ground_truth = probability * valid, ground_truth & valid
        mask = probability if probability.dtype == bool else probability > 0.5
        pixels = int(np.count_nonzero(valid))
        tp = np.count_nonzero(mask & ground_truth)
        fp, fn = np.count_nonzero(mask) - tp, np.count_nonzero(ground_truth) - tp
        score = {"tp": float(tp), "fp": float(fp), "fn": float(fn), "tn": float(pixels - tp - fp - fn)}
        if mask is probability:
            score["mae"] = (fp + fn) / max(pixels, 1)
        else:
            score["mae"] = float(np.abs(probability.astype(np.float64) - ground_truth).sum() / max(pixels, 1))
        if "f_w" in self.metrics:
            score["f_w"] = weighted_f_measure(probability, ground_truth, self.protocol.integer_errors)
        if "s_measure" in self.metrics:
            score["s_measure"] = s_measure(probability, ground_truth, self.protocol.released_measures)
        self.scores.append(score)
        return score

    def _class_recall(self, tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
        """Compute, per image, the mean recall of foreground and background, over those of the two that count."""
        counts = np.stack([tp + fn > 0, tn + fp > 0])
        recall = np.stack([_ratio(tp, tp + fn), _ratio(tn, tn + fp)]) * counts
        if self.protocol.released_measures:  # a class without pixels counts with a recall of 0
            return recall.mean(axis=0)
        return np.where(counts.any(axis=0), recall.sum(axis=0) / np.maximum(counts.sum(axis=0), 1), 1.0)

    def merge(self, other: MaskMetrics | Iterable[Mapping[str, float]]) -> None:
        """Add the images of another accumulator, or results of `update` (from disk or another process)."""
        self.scores += other.scores if isinstance(other, MaskMetrics) else list(other)

    def compute(self) -> dict[str, float]:
        """Compute each metric over all images, in percent.

        Raises:
            ValueError: If there are no images.
        """
        if not self.scores:
            raise ValueError("score_masks: there are no masks; give at least one.")
        tp, fp, fn, tn = (
            np.array([score[name] for score in self.scores]) for name in ("tp", "fp", "fn", "tn")
        )
        foreground, background = _ratio(tp, tp + fp + fn), _ratio(tn, tn + fp + fn)
        per_image = {
            "miou": (foreground + background) / 2,
            "giou": foreground,
            "ber": 1 - self._class_recall(tp, fp, fn, tn),
            "mdice": _ratio(2 * tp, 2 * tp + fp + fn),
        }
        values = {}
        for name in self.metrics:
            if name == "ciou":
                values[name] = float(_ratio(tp.sum(), (tp + fp + fn).sum()))
            else:
                image_values = (
                    per_image[name] if name in per_image else [score[name] for score in self.scores]
                )
                values[name] = math.fsum(image_values) / len(self.scores)
        return {name: 100 * value for name, value in values.items()}


def score_masks(
    predictions: Iterable[Any],
    ground_truths: Iterable[Any],
    protocol: str = "standard",
    ignore_index: int | None = 255,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Score predicted masks against ground truth masks.

    A pixel is predicted as foreground where its probability exceeds 0.5. BER is the mean error rate of the classes
    that occur in the image ("released" in `protocols` differs). F_w is 0 where the ground truth is empty, whatever the
    prediction, as in PySODMetrics; all other metrics are perfect where prediction and ground truth are both empty.

    Args:
        predictions: Per image, a bool array, a float array of probabilities, or a PIL mask for `images.load_mask`
            (0 and 1, or 0 and 255), all (H, W).
        ground_truths: Per image, a bool array, a PIL mask as above (without pixels to ignore), or an integer array of
            labels: 0 for background, 1 for foreground, and `ignore_index`. It has the size of the prediction, except
            under "paper" and "released", which resize both where no pixels are ignored.
        protocol: `"standard"`: compare at the resolution of the ground truth, with MAE, F_w and S-measure computed on
            probabilities if predictions are probabilities. `"released"`: the protocol of the paper's figures.
            `"paper"`: an approximation of it. See `protocols`.
        ignore_index: Label of the pixels to ignore, or None.
        metrics: Names of metrics, from `METRICS` and `LIBRARY_METRICS`; the latter need
            `pip install conceptseg-hf[eval]`.

    Returns:
        Each metric in percent. Lower is better for mae and ber, higher for all others.

    Raises:
        ValueError: If there are no masks, their numbers or sizes differ, or a name or label is unknown.
        ImportError: If a metric needs a package that is not installed.
    """
    accumulated = MaskMetrics(protocol, ignore_index, metrics)
    for prediction, ground_truth in _pairs(predictions, ground_truths):
        accumulated.update(prediction, ground_truth)
    return accumulated.compute()


def _pairs(predictions: Iterable[Any], ground_truths: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    try:
        yield from zip(predictions, ground_truths, strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError(
            "score_masks: the numbers of predictions and ground truths differ; give one prediction per ground truth."
        ) from error


def _as_ground_truth(
    ground_truth: Any, ignore_index: int | None, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ground truth mask and the mask of the pixels that count."""
    if isinstance(ground_truth, Image.Image):
        mask = load_mask(ground_truth)
        return mask, np.ones_like(mask)
    labels = _as_2d_array(ground_truth, f"ground truth {index}")
    if labels.dtype == bool:
        return labels, np.ones_like(labels)
    valid = np.ones(labels.shape, dtype=bool) if ignore_index is None else labels != ignore_index
    if not np.isin(labels[valid], (0, 1)).all() or (
        ignore_index is not None and not valid.all() and not (labels == 1).any()
    ):
        # The second condition is nearly always met by a mask of 0 and 255, which would have no foreground pixels.
        raise ValueError(
            f"score_masks: ground truth {index} has the labels {np.unique(labels)[:5].tolist()}; give 0, 1 and "
            f"{ignore_index} for ignored pixels, or a bool array for a mask of 0 and 255."
        )
    return labels == 1, valid


def _as_probability(prediction: Any, index: int) -> np.ndarray:
    if isinstance(prediction, Image.Image):
        return load_mask(prediction)
    values = _as_2d_array(prediction, f"prediction {index}")
    if values.dtype != bool and not (
        values.dtype.kind == "f" and (values.min(initial=0) >= 0) and (values.max(initial=0) <= 1)
    ):
        raise ValueError(
            f"score_masks: prediction {index} is a {values.dtype} array; give bool, or probabilities from "
            "0 to 1 as float."
        )
    return values


def _as_2d_array(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"score_masks: {name} has shape {array.shape}; give (H, W), one mask at a time.")
    return array


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Divide elementwise; 1 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1.0)


__all__ = ["METRICS", "MaskMetrics", "box_iou", "foreground_iou", "presence_auc", "score_masks"]
