"""Evaluation backend "conceptseg": the metrics and protocols of this package in FiftyOne's Model Evaluation panel.

FiftyOne's default backend skips samples without a prediction and compares pixel values. This backend scores a missing
prediction as an empty mask and binarizes masks as `images.load_mask` does, or by the pixel value of a given class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import fiftyone as fo
import fiftyone.utils.eval.segmentation as foues
import numpy as np

from ...data.ground_truths import resize
from ...evaluation.metrics import LIBRARY_METRICS, METRICS, MaskMetrics
from ...evaluation.reporting.tables import HEADINGS, LOWER_IS_BETTER
from ...images import load_mask
from ...mask_checks import is_similar_size
from .evaluation_runs import COUNTS, left_out_of, replaced_since, report_of
from .field_locks import locked
from .gt_masks import check_class, load_gt_mask, load_probabilities
from .labels import mask_of, predicted_mask
from .schema import GROUND_TRUTH, IGNORE, fields_of_type

BACKEND = "conceptseg"
CLASSES = ["background", "concept"]
SCORES = ("iou", "dice", *COUNTS, "mae", *LIBRARY_METRICS)
"""Scores that a run stores per sample; those in `LIBRARY_METRICS` are stored only if they are requested."""
LABELS = HEADINGS | {"f_w": "Weighted F-measure", "giou": "gIoU (mean foreground IoU)"}

__all__ = [
    "ConceptSegEvaluation",
    "ConceptSegEvaluationConfig",
    "check_eval_key",
    "evaluate_concepts",
    "left_out_of",
    "register_evaluation_backend",
    "replaced_since",
    "report_of",
]


class ConceptSegEvaluationConfig(foues.SegmentationEvaluationConfig):
    """Configuration of an evaluation; FiftyOne derives the class name `ConceptSegEvaluation` by removing "Config".

    Args:
        pred_field: Field of the predictions (`fo.Segmentation`).
        gt_field: Field of the ground-truth masks (`fo.Segmentation`).
        protocol: `"standard"`, `"paper"` or `"released"`; see `conceptseg_hf.evaluation.metrics.protocols`.
        metrics: Names from `METRICS` and `LIBRARY_METRICS`.
        ignore_field: Field with masks of the pixels to ignore, or None; the default is used only if the dataset has it.
        heatmap_field: Field with mask probabilities, from which MAE, F_w and S-measure are computed, or None.
        gt_class: Pixel value of the concept in the ground-truth masks; pixels of value 255 are then ignored. If None,
            all non-background pixels are foreground.
    """

    def __init__(
        self,
        pred_field: str,
        gt_field: str,
        protocol: str = "standard",
        metrics: Sequence[str] = METRICS,
        ignore_field: str | None = IGNORE,
        heatmap_field: str | None = None,
        gt_class: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pred_field, gt_field, **kwargs)
        self.protocol, self.metrics = protocol, list(metrics)
        self.ignore_field, self.heatmap_field, self.gt_class = ignore_field, heatmap_field, gt_class

    @property
    def method(self) -> str:
        """Name of the evaluation backend."""
        return BACKEND


class ConceptSegEvaluation(foues.SegmentationEvaluation):
    """Scores masks as `conceptseg_hf.evaluation` does and stores the per-sample scores in fields of the run."""

    def score_fields(self, eval_key: str) -> dict[str, str]:
        """Return the sample field of each per-sample score."""
        return _score_fields(eval_key, self.config.metrics)

    def check(self, samples: Any, eval_key: str | None) -> None:
        """Validate fields, class and key without reading any mask.

        Raises:
            ValueError: As in `evaluate_concepts`.
        """
        config = self.config
        if config.pred_field == config.gt_field:
            raise ValueError(
                f"field {config.gt_field!r} is used both for predictions and ground truth; use two different fields."
            )
        _check_field(samples, config.pred_field, fo.Segmentation)
        _check_field(samples, config.gt_field, fo.Segmentation)
        if config.heatmap_field is not None:
            _check_field(samples, config.heatmap_field, fo.Heatmap)
        ignore_field = _ignore_field(samples, config)
        if ignore_field is not None:
            _check_field(samples, ignore_field, fo.Segmentation)
        check_class(samples, config.gt_field, config.gt_class)
        check_eval_key(samples, eval_key, config.pred_field, config.gt_field, config.metrics)

    def register_run(
        self, samples: Any, key: str | None, overwrite: bool = True, cleanup: bool = True
    ) -> None:
        """Register a run after checking that a sample can be scored; registering deletes a run with the same key."""
        self.check(samples, key)
        _Scorer(samples, self.config).check()
        super().register_run(samples, key, overwrite=overwrite, cleanup=cleanup)

    def register_samples(self, samples: Any, eval_key: str | None) -> None:
        """Declare the score fields."""
        if eval_key is not None:
            for name in self.score_fields(eval_key).values():
                samples._dataset.add_sample_field(name, fo.FloatField)

    def evaluate_samples(
        self, samples: Any, eval_key: str | None = None, mask_targets: Any = None, progress: Any = None
    ) -> foues.SegmentationResults:
        """Score the samples that have a ground-truth mask.

        Args:
            samples: Dataset or view to evaluate.
            eval_key: Key of the run; if None, no scores are stored.
            mask_targets: Unused, as there is only one class.
            progress: As in `fiftyone.core.collections.SampleCollection.iter_samples`.
        """
        config, scorer = self.config, _Scorer(samples, self.config)
        names = {} if eval_key is None else self.score_fields(eval_key)
        matches: list[tuple[Any, ...]] = []
        self.unscored: dict[str, str] = {}
        for sample in scorer.samples.iter_samples(progress=progress, autosave=eval_key is not None):
            try:
                score = scorer.score(sample)
            except (ValueError, OSError) as error:  # a missing file, or a mask of a different size
                self.unscored[sample.id] = str(error)
                continue
            matches += _matches(score, sample[config.gt_field], sample[config.pred_field])
            for name, field in names.items():
                sample[field] = _fraction_of(name, score)
        scores = scorer.total.scores
        sums = {name: int(sum(score[name] for score in scores)) for name in COUNTS}
        return foues.SegmentationResults(
            samples,
            config,
            eval_key,
            [[sums["tn"], sums["fp"]], [sums["fn"], sums["tp"]]],
            CLASSES,
            matches=matches if any(sums.values()) else [],  # scikit-learn requires a nonzero weight
            missing="background",
            custom_metrics=_custom_metrics(scorer.total.compute()),
            backend=self,
        )

    def get_fields(self, samples: Any, eval_key: str, include_custom_metrics: bool = True) -> list[str]:
        """Return the fields of a run."""
        return list(self.score_fields(eval_key).values())

    def cleanup(self, samples: Any, eval_key: str) -> None:
        """Delete the fields of a run."""
        samples._dataset.delete_sample_fields(self.get_fields(samples, eval_key), error_level=1)
        samples._delete_empty_sidebar_group(eval_key)


class _Scorer:
    """Scores samples that have a ground-truth mask one at a time and accumulates the results in `total`."""

    def __init__(self, samples: Any, config: ConceptSegEvaluationConfig) -> None:
        self._config, self._ignore_field = config, _ignore_field(samples, config)
        self.total = MaskMetrics(config.protocol, metrics=config.metrics)
        fields = (config.pred_field, config.gt_field, config.heatmap_field, self._ignore_field)
        self.samples = samples.exists(config.gt_field).select_fields([name for name in fields if name])

    def check(self) -> None:
        """Check that at least one sample can be scored; `total` is invalid afterwards.

        Raises:
            ValueError: If no sample can be scored.
        """
        reason = None
        for sample in self.samples.iter_samples():
            try:
                self.score(sample)
                return
            except (ValueError, OSError) as error:
                reason = reason or error
        field = self._config.gt_field
        if reason is None:
            raise ValueError(f"no sample has a mask in {field!r}; use the field of the ground-truth masks.")
        raise ValueError(f"no sample with a mask in {field!r} can be scored: {reason}")

    def score(self, sample: Any) -> dict[str, float]:
        """Score a sample.

        A ground-truth mask with nearly the size of the predicted mask (see `mask_checks.is_similar_size`) is resized to
        it. If the protocol resizes both masks, they may have any size.

        Raises:
            ValueError: If a mask cannot be read, has a different size, or contains several classes.
            OSError: If a file is missing.
        """
        config = self._config
        ground_truth, ignore = load_gt_mask(sample[config.gt_field], config.gt_class)
        prediction = predicted_mask(sample[config.pred_field])
        mask = np.zeros_like(ground_truth) if prediction is None else load_mask(prediction)
        size = (mask.shape[1], mask.shape[0])
        if config.heatmap_field and prediction is not None and sample[config.heatmap_field] is not None:
            mask = load_probabilities(sample[config.heatmap_field], mask)
        ignored = None if self._ignore_field is None else mask_of(sample[self._ignore_field])
        if ignore is not None:
            ignore = _fit(ignore, size, "ground-truth mask")
        if ignored is not None:
            pixels = _fit(load_mask(ignored), size, "ignore mask")
            ignore = pixels if ignore is None else ignore | pixels
        if ignore is not None or self.total.protocol.size is None:
            ground_truth = _fit(ground_truth, size, "ground-truth mask")
        return self.total.update(mask, ground_truth, ignore)


def _fit(mask: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    """Resize a mask (H, W) bool to the size (width, height) of the predicted mask.

    Raises:
        ValueError: If the sizes differ by more than rounding or scale.
    """
    own_size = (mask.shape[1], mask.shape[0])
    if not is_similar_size(own_size, size):
        raise ValueError(
            f"{kind} has {own_size[0]} x {own_size[1]} pixels, but the predicted mask has {size[0]} x {size[1]}; "
            "use masks of the image's size."
        )
    return resize(mask, size)


def register_evaluation_backend() -> None:
    """Register the backend for `samples.evaluate_segmentations(..., method="conceptseg")` in the current process."""
    name = f"{ConceptSegEvaluationConfig.__module__}.{ConceptSegEvaluationConfig.__qualname__}"
    fo.evaluation_config.segmentation_backends[BACKEND] = {"config_cls": name}


def evaluate_concepts(
    samples: Any,
    pred_field: str = "concept",
    gt_field: str = GROUND_TRUTH,
    eval_key: str | None = None,
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
    heatmap_field: str | None = None,
    ignore_field: str | None = IGNORE,
    gt_class: int | None = None,
    progress: Any = None,
) -> foues.SegmentationResults:
    """Evaluate predicted masks; a missing prediction is an empty mask, and samples without ground truth are skipped.

    Args:
        samples: Dataset or view to evaluate.
        pred_field: Field of the predictions.
        gt_field: Field of the ground-truth masks.
        eval_key: Key under which the run is stored and shown in the App; if None, nothing is stored.
        protocol: `"standard"`, `"paper"` or `"released"`.
        metrics: Names from `METRICS` and `LIBRARY_METRICS`.
        heatmap_field: Field with mask probabilities to score, or None.
        ignore_field: Field with masks of the pixels to ignore, or None; the default is used only if the dataset has it.
        gt_class: Pixel value of the concept in the ground-truth masks; pixels of value 255 are then ignored. If None,
            all non-background pixels are foreground.
        progress: As FiftyOne's `progress` argument.

    Returns:
        FiftyOne's results. `results.custom_metrics` holds the metrics in percent; `results.backend.unscored` holds the
        reason, by sample id, for each sample that was skipped (a missing file, a different size, several classes).

    Raises:
        ValueError: If fields are missing, hidden or of the wrong type, no sample can be scored, the protocol or a
            metric is unknown, `eval_key` is in use by another run or evaluation, or `gt_class` is required.
    """
    settings: dict[str, Any] = {
        "gt_field": gt_field,
        "protocol": protocol,
        "metrics": metrics,
        "ignore_field": ignore_field,
        "heatmap_field": heatmap_field,
        "gt_class": gt_class,
    }
    config = ConceptSegEvaluationConfig(pred_field, **settings)
    config.build().check(samples, eval_key)  # before FiftyOne's own checks, for clearer messages
    dataset, subject = samples._dataset, f"evaluation {eval_key!r}"
    with contextlib.nullcontext() if eval_key is None else locked(dataset, [f"({subject})"], subject):
        try:
            return samples.evaluate_segmentations(
                pred_field,
                eval_key=eval_key,
                method=ConceptSegEvaluationConfig,
                progress=progress,
                **settings,
            )
        except BaseException:  # including Ctrl-C: a partial run must not remain
            if eval_key in samples.list_evaluations() and samples.load_evaluation_results(eval_key) is None:
                dataset.delete_evaluation(eval_key)
            raise


def check_eval_key(
    samples: Any, eval_key: str | None, pred_field: str, gt_field: str, metrics: Sequence[str] = METRICS
) -> None:
    """Check that a run with this key overwrites no other run or field; a run on the same two fields may be replaced.

    Raises:
        ValueError: If the key is invalid or in use.
    """
    if eval_key is None:
        return
    if not eval_key.isidentifier():
        raise ValueError(f"run name {eval_key!r} is invalid; use letters, digits and underscores.")
    replaced: set[str] = set()
    if eval_key in samples.list_evaluations():
        stored = samples.get_evaluation_info(eval_key).config
        if stored.method != BACKEND or (stored.pred_field, stored.gt_field) != (pred_field, gt_field):
            raise ValueError(
                f"evaluation {eval_key!r} uses other fields or another method; use another name, or delete it first."
            )
        replaced.update(_score_fields(eval_key, stored.metrics).values())
    for name in _score_fields(eval_key, metrics).values():
        if name not in replaced and samples._dataset.has_field(name):  # a view may hide it
            raise ValueError(f"field {name!r} already exists; use another name for the evaluation.")


def _score_fields(eval_key: str, metrics: Sequence[str]) -> dict[str, str]:
    names = [name for name in SCORES if name not in LIBRARY_METRICS or name in metrics]
    return {name: f"{eval_key}_{name}" for name in names}


def _ignore_field(samples: Any, config: ConceptSegEvaluationConfig) -> str | None:
    """Return the field with the ignore masks, or None; the default is used only if the dataset has it with masks."""
    name = config.ignore_field
    return None if name == IGNORE and name not in fields_of_type(samples._dataset, fo.Segmentation) else name


def _check_field(samples: Any, name: str, label_type: type) -> None:
    if not samples._dataset.has_field(name):
        raise ValueError(f"field {name!r} is not in the dataset; use one of its fields.")
    if not samples.has_field(name):
        raise ValueError(f"field {name!r} is hidden by the view; use a view that shows it, or the dataset.")
    if name not in fields_of_type(samples, label_type):
        raise ValueError(
            f"field {name!r} holds no {label_type.__name__}; use one that does "
            "(fiftyone.utils.labels.objects_to_segmentations creates one from Detections)."
        )


def _matches(
    score: dict[str, float], ground_truth: fo.Segmentation, prediction: fo.Segmentation | None
) -> Iterator[tuple[Any, ...]]:
    """Yield FiftyOne's records of a sample: at least one, to mark it as scored, with weight 0 if no pixel counts."""
    background, concept = CLASSES
    pairs = ((concept, concept), (background, concept), (concept, background), (background, background))
    for (true, predicted), name in zip(pairs, COUNTS):
        if score[name] or name == "tn":
            prediction_id = None if prediction is None else prediction.id
            yield true, predicted, int(score[name]), ground_truth.id, prediction_id


def _fraction_of(name: str, score: dict[str, float]) -> float:
    if name == "iou":
        union = score["tp"] + score["fp"] + score["fn"]
        return score["tp"] / union if union else 1.0
    if name == "dice":
        area = 2 * score["tp"] + score["fp"] + score["fn"]
        return 2 * score["tp"] / area if area else 1.0
    return score[name]


def _custom_metrics(values: dict[str, float]) -> dict[str, dict[str, Any]]:
    return {
        f"{BACKEND}_{name}": {
            "key": name,
            "value": value,
            "label": f"{LABELS[name]} (%)",
            "lower_is_better": name in LOWER_IS_BETTER,
        }
        for name, value in values.items()
    }
