"""Metrics as pure functions, and `MaskMetrics`, which accumulates them.

Masks are bool arrays of shape (H, W). Wherever a ratio has nothing to count (an empty prediction of an empty
truth), the answer is right and the metric perfect; but for F_w, which is 0 wherever the truth is empty, as in
PySODMetrics. Conventions of names follow the paper (appendix E): mIoU
averages foreground and background, gIoU is the mean foreground IoU of the images, cIoU pools intersections
and unions over all images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...boxes import box_iou
from ...images import load_gray_mask, load_mask
from ...suggestions import did_you_mean
from .protocols import get_protocol
from .s_measure import load_library, s_measure
from .weighted_f import load_ndimage, weighted_f_measure

METRICS = ("miou", "giou", "ciou", "mae", "ber", "mdice")
# These need SciPy and pysodmetrics: pip install conceptseg-hf[eval].
LIBRARY_METRICS = ("f_w", "s_measure")


def foreground_iou(
    prediction: np.ndarray, ground_truth: np.ndarray, ignore: np.ndarray | None = None
) -> float:
    """Intersection over union of two masks; 1 when both are empty.

    Args:
        prediction: (H, W) bool.
        ground_truth: (H, W) bool.
        ignore: (H, W) bool, pixels that do not count.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(
            f"foreground_iou: the shapes {prediction.shape} and {ground_truth.shape} differ; bring the masks to "
            "one size."
        )
    if ignore is not None:
        prediction, ground_truth = prediction & ~ignore, ground_truth & ~ignore
    union = np.count_nonzero(prediction | ground_truth)
    return np.count_nonzero(prediction & ground_truth) / union if union else 1.0


def presence_auc(scores: Sequence[float], present: Sequence[bool]) -> float | None:
    """Probability that a sample with the concept scores above one without it (area under the ROC curve).

    Ties count half.

    Args:
        scores: Presence scores, any monotone scale.
        present: Whether the concept is there.

    Returns:
        A number in [0, 1], or None unless both kinds of samples occur.

    Raises:
        ValueError: If the lengths differ.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(present, dtype=bool)
    if values.shape != labels.shape:
        raise ValueError(f"presence_auc: got {len(values)} scores for {len(labels)} labels; give one each.")
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, counted from 1; ties share theirs
    rank_sum = ranks[inverse][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


class MaskMetrics:
    """Accumulates the scores of masks, image by image.

    Sums are exactly rounded (`math.fsum`): neither the order of the images nor how they were spread over batches or
    processes changes a digit of the result.

    Args:
        protocol: `"standard"`, `"paper"` or `"released"`; see `protocols`.
        ignore_index: Label of the pixels that do not count, or None.
        metrics: Which ones: any of `METRICS` and `LIBRARY_METRICS`.

    Raises:
        ValueError: If a protocol or metric is unknown.
        ImportError: If a metric needs a package that is missing.
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
        """Scores one image.

        Args:
            prediction: As an item of `score_masks`.
            ground_truth: As an item of `score_masks`.
            ignore: Where pixels do not count, a bool array or a PIL mask of the truth's size, beside labels of
                `ignore_index`.
            own_size: Compare at the truth's size whatever the protocol's is; see `Protocol.own_size`.

        Returns:
            What it adds to `scores`.
        """
        index = len(self.scores)
        ground_truth, counted = _as_ground_truth(ground_truth, self.ignore_index, index)
        if ignore is not None:
            ignored = _as_probability(ignore, index)
            if ignored.shape != ground_truth.shape:
                raise ValueError(
                    f"score_masks: the ignore mask of image {index} has shape {ignored.shape}, its truth "
                    f"{ground_truth.shape}; bring it to the truth's size."
                )
            counted = counted & ~(ignored > 0.5)
        keep_size = own_size or ignore is not None or not counted.all()
        probability = _as_probability(prediction, index)
        are_resized = not keep_size and self.protocol.size is not None
        if probability.shape != ground_truth.shape and not are_resized:
            raise ValueError(
                f"score_masks: prediction {index} has shape {probability.shape}, its truth {ground_truth.shape}; "
                "bring them to the truth's size."
            )
        is_soft = (
            self.protocol.bicubic_ground_truths and are_resized and isinstance(ground_truth, Image.Image)
        )
        soft_ground_truth = load_gray_mask(ground_truth) if is_soft else None
        probability, ground_truth, counted = self.protocol.prepare(
            probability, ground_truth, counted, keep_size, soft_ground_truth
        )
        if not counted.all():
            probability, ground_truth = probability * counted, ground_truth & counted
        mask = probability if probability.dtype == bool else probability > 0.5
        pixels = int(np.count_nonzero(counted))
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
        """Per image, the recall of foreground and background, averaged over those of the two that count."""
        counts = np.stack([tp + fn > 0, tn + fp > 0])
        recall = np.stack([_ratio(tp, tp + fn), _ratio(tn, tn + fp)]) * counts
        if self.protocol.released_measures:  # a class that does not occur has no hits
            return recall.mean(axis=0)
        return np.where(counts.any(axis=0), recall.sum(axis=0) / np.maximum(counts.sum(axis=0), 1), 1.0)

    def merge(self, other: MaskMetrics | Iterable[Mapping[str, float]]) -> None:
        """Adds the images of another accumulator, or scores that one has returned (from disk, another process)."""
        self.scores += other.scores if isinstance(other, MaskMetrics) else list(other)

    def compute(self) -> dict[str, float]:
        """Each metric over all images, in percent.

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
                each = per_image[name] if name in per_image else [score[name] for score in self.scores]
                values[name] = math.fsum(each) / len(self.scores)
        return {name: 100 * value for name, value in values.items()}


def score_masks(
    predictions: Iterable[Any],
    ground_truths: Iterable[Any],
    protocol: str = "standard",
    ignore_index: int | None = 255,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Scores masks against the truth.

    A pixel is predicted as foreground when its probability exceeds 0.5. BER is the mean error rate of the classes
    that occur in the image (but see "released" in `protocols`). F_w is 0 where the truth is empty, whatever was
    predicted, as in PySODMetrics; all other metrics are perfect where nothing is found and nothing is there.

    Args:
        predictions: Per image a bool array, a float array of probabilities, or a PIL mask as `images.load_mask` reads
            it (0 and 1, or 0 and 255), all (H, W).
        ground_truths: Per image a bool array, a PIL mask likewise (nothing ignored), or an integer array of labels: 0
            background, 1 foreground, and `ignore_index`. It has the size of the prediction, except under "paper" and
            "released", which resize both where no pixels are ignored.
        protocol: `"standard"`: at the truth's resolution; MAE, F_w and S-measure see probabilities where there are
            some. `"released"`: as the paper's figures were made. `"paper"`: near to that. See `protocols`.
        ignore_index: Label of the pixels that do not count, or None.
        metrics: Which ones: any of `METRICS`, and of `LIBRARY_METRICS`, which need `pip install
            conceptseg-hf[eval]`.

    Returns:
        Each metric in percent. Lower is better for mae and ber, higher for all others.

    Raises:
        ValueError: If there are no masks, their numbers or sizes differ, or a name or label is unknown.
        ImportError: If a metric needs a package that is missing.
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
            "score_masks: there are more predictions than truths, or fewer; give one prediction per truth."
        ) from error


def _as_ground_truth(
    ground_truth: Any, ignore_index: int | None, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """The true mask, and where it counts."""
    if isinstance(ground_truth, Image.Image):
        mask = load_mask(ground_truth)
        return mask, np.ones_like(mask)
    labels = _as_plane(ground_truth, f"truth {index}")
    if labels.dtype == bool:
        return labels, np.ones_like(labels)
    counted = np.ones(labels.shape, dtype=bool) if ignore_index is None else labels != ignore_index
    if not np.isin(labels[counted], (0, 1)).all() or (
        ignore_index is not None and not counted.all() and not (labels == 1).any()
    ):
        # The second case is nearly always a mask of 0 and 255, which would count as nothing but ignored
        # pixels.
        raise ValueError(
            f"score_masks: truth {index} holds the labels {np.unique(labels)[:5].tolist()}; give 0, 1 and "
            f"{ignore_index} for ignored pixels, "
            "or a bool array for a mask of 0 and 255."
        )
    return labels == 1, counted


def _as_probability(prediction: Any, index: int) -> np.ndarray:
    if isinstance(prediction, Image.Image):
        return load_mask(prediction)
    values = _as_plane(prediction, f"prediction {index}")
    if values.dtype != bool and not (
        values.dtype.kind == "f" and (values.min(initial=0) >= 0) and (values.max(initial=0) <= 1)
    ):
        raise ValueError(
            f"score_masks: prediction {index} is a {values.dtype} array; give bool, or probabilities from "
            "0 to 1 as float."
        )
    return values


def _as_plane(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"score_masks: {what} has shape {array.shape}; give (H, W), one mask at a time.")
    return array


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Numerator / denominator, and 1 where there is nothing to count."""
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1.0)


__all__ = ["METRICS", "MaskMetrics", "box_iou", "foreground_iou", "presence_auc", "score_masks"]
