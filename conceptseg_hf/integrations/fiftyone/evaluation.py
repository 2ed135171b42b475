"""Evaluation backend "conceptseg": the project's metrics and protocols in FiftyOne's Model Evaluation panel.

FiftyOne's own backend leaves out samples without a prediction and compares pixel values; here a missing prediction is
an empty mask, and a pixel is foreground as `images.load_mask` says, or where it has the value of one class.
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
"""What a run keeps of each sample; those of `LIBRARY_METRICS` only where they are asked for."""
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
    """Settings of an evaluation; FiftyOne finds `ConceptSegEvaluation` by leaving "Config" out of this name.

    Args:
        pred_field: The predictions, `fo.Segmentation`.
        gt_field: The true masks, `fo.Segmentation`.
        protocol: `"standard"`, `"paper"` or `"released"`; see `conceptseg_hf.evaluation.metrics.protocols`.
        metrics: Some of `METRICS` and `LIBRARY_METRICS`.
        ignore_field: Masks of pixels that do not count, or None; the default counts where the dataset has it.
        heatmap_field: Mask probabilities, which MAE, F_w and S-measure then see, or None.
        gt_class: Pixel value of the concept in the true masks; 255 then does not count. None: all pixels that are not
            background.
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
        """Name of the backend."""
        return BACKEND


class ConceptSegEvaluation(foues.SegmentationEvaluation):
    """Scores masks as `conceptseg_hf.evaluation` does and keeps each sample's share in fields of the run."""

    def score_fields(self, eval_key: str) -> dict[str, str]:
        """The sample field of each number of a sample."""
        return _score_fields(eval_key, self.config.metrics)

    def check(self, samples: Any, eval_key: str | None) -> None:
        """Finds what would fail, whatever the masks hold.

        Raises:
            ValueError: As `evaluate_concepts`.
        """
        config = self.config
        if config.pred_field == config.gt_field:
            raise ValueError(
                f"field {config.gt_field!r} is given as predictions and as truth; give two fields."
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
        """Registers a run once it is sure to have results: a run of the same key is deleted here."""
        self.check(samples, key)
        _Scorer(samples, self.config).check()
        super().register_run(samples, key, overwrite=overwrite, cleanup=cleanup)

    def register_samples(self, samples: Any, eval_key: str | None) -> None:
        """Declares the fields."""
        if eval_key is not None:
            for name in self.score_fields(eval_key).values():
                samples._dataset.add_sample_field(name, fo.FloatField)

    def evaluate_samples(
        self, samples: Any, eval_key: str | None = None, mask_targets: Any = None, progress: Any = None
    ) -> foues.SegmentationResults:
        """Scores the samples that have a true mask.

        Args:
            samples: The samples.
            eval_key: Key of the run; None keeps nothing.
            mask_targets: Unused: there is one class.
            progress: As in `fiftyone.core.collections.SampleCollection.iter_samples`.
        """
        config, scorer = self.config, _Scorer(samples, self.config)
        names = {} if eval_key is None else self.score_fields(eval_key)
        matches: list[tuple[Any, ...]] = []
        self.unscored: dict[str, str] = {}
        for sample in scorer.samples.iter_samples(progress=progress, autosave=eval_key is not None):
            try:
                score = scorer.score(sample)
            except (ValueError, OSError) as error:  # a lost file, or a mask of another size
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
            matches=matches if any(sums.values()) else [],  # scikit-learn wants a weight that is not 0
            missing="background",
            custom_metrics=_custom_metrics(scorer.total.compute()),
            backend=self,
        )

    def get_fields(self, samples: Any, eval_key: str, include_custom_metrics: bool = True) -> list[str]:
        """The fields of a run."""
        return list(self.score_fields(eval_key).values())

    def cleanup(self, samples: Any, eval_key: str) -> None:
        """Deletes the fields of a run."""
        samples._dataset.delete_sample_fields(self.get_fields(samples, eval_key), error_level=1)
        samples._delete_empty_sidebar_group(eval_key)


class _Scorer:
    """Scores the samples that have a true mask, one by one, into `total`."""

    def __init__(self, samples: Any, config: ConceptSegEvaluationConfig) -> None:
        self._config, self._ignore_field = config, _ignore_field(samples, config)
        self.total = MaskMetrics(config.protocol, metrics=config.metrics)
        fields = (config.pred_field, config.gt_field, config.heatmap_field, self._ignore_field)
        self.samples = samples.exists(config.gt_field).select_fields([name for name in fields if name])

    def check(self) -> None:
        """Scores samples up to the first that can be; afterwards `total` is of no use.

        Raises:
            ValueError: If there is none.
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
            raise ValueError(f"no sample has a mask in {field!r}; give the field of the true masks.")
        raise ValueError(f"no sample with a mask in {field!r} can be scored: {reason}")

    def score(self, sample: Any) -> dict[str, float]:
        """Scores a sample.

        A true mask that has nearly the size of the predicted one (see `mask_checks.is_similar_size`) is resized to it.
        Where the protocol resizes both anyway, they may have any size.

        Raises:
            ValueError: If a mask cannot be read, has another size, or holds several classes.
            OSError: If a file is lost.
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
            ignore = _fit(ignore, size, "the true mask")
        if ignored is not None:
            pixels = _fit(load_mask(ignored), size, "the mask of pixels that do not count")
            ignore = pixels if ignore is None else ignore | pixels
        if ignore is not None or self.total.protocol.size is None:
            ground_truth = _fit(ground_truth, size, "the true mask")
        return self.total.update(mask, ground_truth, ignore)


def _fit(mask: np.ndarray, size: tuple[int, int], what: str) -> np.ndarray:
    """A mask (H, W) bool at the size (width, height) of the predicted one.

    Raises:
        ValueError: If its own is another by more than rounding or scale.
    """
    found = (mask.shape[1], mask.shape[0])
    if not is_similar_size(found, size):
        raise ValueError(
            f"{what} has {found[0]} x {found[1]} pixels, but the predicted one {size[0]} x {size[1]}; "
            "give masks of the image's size."
        )
    return resize(mask, size)


def register_evaluation_backend() -> None:
    """Lets `samples.evaluate_segmentations(..., method="conceptseg")` find the backend, in this process."""
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
    """Scores predictions; samples without a prediction count as empty masks, samples without a truth not at all.

    Args:
        samples: A dataset or view.
        pred_field: The predictions.
        gt_field: The true masks.
        eval_key: Key under which the run is kept and shown in the App; None keeps nothing.
        protocol: `"standard"`, `"paper"` or `"released"`.
        metrics: Some of `METRICS` and `LIBRARY_METRICS`.
        heatmap_field: Mask probabilities to score with, or None.
        ignore_field: Masks of pixels that do not count, or None; the default counts where the dataset has it.
        gt_class: Pixel value of the concept in the true masks; 255 then does not count. None: all pixels that are not
            background.
        progress: As FiftyOne's `progress`.

    Returns:
        FiftyOne's results; `results.custom_metrics` holds the metrics, in percent, and `results.backend.unscored` why
        samples were left out (a lost file, a mask of another size or of several classes), by sample id.

    Raises:
        ValueError: If fields are missing, hidden or of another type, no sample can be scored, the protocol or a metric
            does not exist, `eval_key` names something else or is being written by another evaluation, or one class of
            several has to be chosen.
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
    config.build().check(samples, eval_key)  # FiftyOne checks fields before it registers a run, in its words
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
        except BaseException:  # Ctrl-C, too: half a run would pass for a whole one
            if eval_key in samples.list_evaluations() and samples.load_evaluation_results(eval_key) is None:
                dataset.delete_evaluation(eval_key)
            raise


def check_eval_key(
    samples: Any, eval_key: str | None, pred_field: str, gt_field: str, metrics: Sequence[str] = METRICS
) -> None:
    """Finds runs and fields that a run of this key would spoil; a run of the same fields may be replaced.

    Raises:
        ValueError: If the key cannot be one, or is taken.
    """
    if eval_key is None:
        return
    if not eval_key.isidentifier():
        raise ValueError(f"{eval_key!r} cannot be a run's name; use letters, digits and underscores.")
    replaced: set[str] = set()
    if eval_key in samples.list_evaluations():
        kept = samples.get_evaluation_info(eval_key).config
        if kept.method != BACKEND or (kept.pred_field, kept.gt_field) != (pred_field, gt_field):
            raise ValueError(
                f"evaluation {eval_key!r} is of other fields or another method; give another name, or delete it first."
            )
        replaced.update(_score_fields(eval_key, kept.metrics).values())
    for name in _score_fields(eval_key, metrics).values():
        if name not in replaced and samples._dataset.has_field(name):  # a view may hide it
            raise ValueError(f"field {name!r} is there already; give the evaluation another name.")


def _score_fields(eval_key: str, metrics: Sequence[str]) -> dict[str, str]:
    wanted = [name for name in SCORES if name not in LIBRARY_METRICS or name in metrics]
    return {name: f"{eval_key}_{name}" for name in wanted}


def _ignore_field(samples: Any, config: ConceptSegEvaluationConfig) -> str | None:
    """The field of the pixels that do not count; the default is one only where the dataset has it as masks."""
    name = config.ignore_field
    return None if name == IGNORE and name not in fields_of_type(samples._dataset, fo.Segmentation) else name


def _check_field(samples: Any, name: str, label_type: type) -> None:
    if not samples._dataset.has_field(name):
        raise ValueError(f"field {name!r} is not in the dataset; give one of its fields.")
    if not samples.has_field(name):
        raise ValueError(f"field {name!r} is hidden by the view; give a view that shows it, or the dataset.")
    if name not in fields_of_type(samples, label_type):
        raise ValueError(
            f"field {name!r} holds no {label_type.__name__}; give one that does "
            "(fiftyone.utils.labels.objects_to_segmentations makes one of Detections)."
        )


def _matches(
    score: dict[str, float], ground_truth: fo.Segmentation, prediction: fo.Segmentation | None
) -> Iterator[tuple[Any, ...]]:
    """What FiftyOne keeps of a sample; at least one, of weight 0 if no pixel counts, as it says what was scored."""
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
