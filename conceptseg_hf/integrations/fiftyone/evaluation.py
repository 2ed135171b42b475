"""Evaluation backend "conceptseg": the project's metrics and protocols in FiftyOne's Model Evaluation panel.

FiftyOne's own backend leaves out samples without a prediction and compares pixel values; here a missing prediction is
an empty mask, and a pixel is foreground as `images.load_mask` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import fiftyone as fo
import fiftyone.utils.eval.segmentation as foues
import numpy as np
from fiftyone import ViewField as F

from ...evaluation.metrics import LIBRARY_METRICS, METRICS, MaskMetrics
from ...evaluation.records import REJECTION_THRESHOLD
from ...evaluation.report import EvaluationReport
from ...evaluation.tables import HEADINGS, LOWER_IS_BETTER
from ...images import load_mask
from .labels import mask_of
from .schema import GROUND_TRUTH, IGNORE

BACKEND = "conceptseg"
CLASSES = ["background", "concept"]
COUNTS = ("tp", "fp", "fn", "tn")
LABELS = HEADINGS | {"f_w": "Weighted F-measure", "giou": "gIoU (mean foreground IoU)"}
_OF_A_BENCHMARK = {
    "level": fo.StringField,
    "group": fo.StringField,
    "episode": fo.StringField,
    "present": fo.BooleanField,
}


class ConceptSegEvaluationConfig(foues.SegmentationEvaluationConfig):
    """Settings of an evaluation; FiftyOne finds `ConceptSegEvaluation` by leaving "Config" out of this name.

    Args:
        pred_field: The predictions, `fo.Segmentation`.
        gt_field: The true masks, `fo.Segmentation`.
        protocol: `"standard"` or `"paper"`; see `conceptseg_hf.evaluation.protocols`.
        metrics: Some of `METRICS` and `LIBRARY_METRICS`.
        ignore_field: Masks of pixels that do not count, or None.
        heatmap_field: Mask probabilities, which MAE, F_w and S-measure then see, or None.
    """

    def __init__(
        self,
        pred_field: str,
        gt_field: str,
        protocol: str = "standard",
        metrics: Sequence[str] = METRICS,
        ignore_field: str | None = None,
        heatmap_field: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pred_field, gt_field, **kwargs)
        self.protocol, self.metrics = protocol, list(metrics)
        self.ignore_field, self.heatmap_field = ignore_field, heatmap_field

    @property
    def method(self) -> str:
        """Name of the backend."""
        return BACKEND


class ConceptSegEvaluation(foues.SegmentationEvaluation):
    """Scores masks as `conceptseg_hf.evaluation` does and keeps each sample's share in fields of the run."""

    def score_fields(self, eval_key: str) -> dict[str, str]:
        """The sample field of each number of a sample."""
        extra = [name for name in LIBRARY_METRICS if name in self.config.metrics]
        return {name: f"{eval_key}_{name}" for name in ("iou", "dice", *COUNTS, "mae", *extra)}

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
        config = self.config
        total = MaskMetrics(config.protocol, metrics=config.metrics)
        fields = [
            name
            for name in (config.pred_field, config.gt_field, config.ignore_field, config.heatmap_field)
            if name
        ]
        names = {} if eval_key is None else self.score_fields(eval_key)
        matches = []
        chosen = samples.exists(config.gt_field).select_fields(fields)
        self.unscored: dict[str, str] = {}
        for sample in chosen.iter_samples(progress=progress, autosave=eval_key is not None):
            try:
                truth, score = self._score(sample, total)
            except (ValueError, OSError) as error:  # a lost file, or a mask of another shape
                self.unscored[sample.id] = str(error)
                continue
            prediction_id = None if sample[config.pred_field] is None else sample[config.pred_field].id
            for (true, predicted), count in zip(
                (
                    ("concept", "concept"),
                    ("background", "concept"),
                    ("concept", "background"),
                    ("background",) * 2,
                ),
                (score[name] for name in COUNTS),
            ):
                if count:
                    matches.append((true, predicted, int(count), truth.id, prediction_id))
            for name, field in names.items():
                sample[field] = _share_of(name, score)
        if not total.scores:
            reason = next(iter(self.unscored.values()), "there is no mask")
            raise ValueError(f"no sample with a mask in {config.gt_field!r} can be scored: {reason}")
        sums = {name: int(sum(score[name] for score in total.scores)) for name in COUNTS}
        return foues.SegmentationResults(
            samples,
            config,
            eval_key,
            [[sums["tn"], sums["fp"]], [sums["fn"], sums["tp"]]],
            CLASSES,
            matches=matches,
            missing="background",
            custom_metrics=_custom_metrics(total.compute()),
            backend=self,
        )

    def _score(self, sample: Any, total: MaskMetrics) -> tuple[fo.Segmentation, dict[str, float]]:
        config = self.config
        label = sample[config.gt_field]
        truth = load_mask(mask_of(label))
        size = (truth.shape[1], truth.shape[0])
        prediction = mask_of(sample[config.pred_field])
        mask = np.zeros_like(truth) if prediction is None else load_mask(prediction, size)
        if config.heatmap_field and prediction is not None and sample[config.heatmap_field] is not None:
            mask = _probabilities(sample[config.heatmap_field], mask)
        ignore = None if config.ignore_field is None else mask_of(sample[config.ignore_field])
        return label, total.update(mask, truth, None if ignore is None else load_mask(ignore, size))

    def get_fields(self, samples: Any, eval_key: str, include_custom_metrics: bool = True) -> list[str]:
        """The fields of a run."""
        return list(self.score_fields(eval_key).values())

    def cleanup(self, samples: Any, eval_key: str) -> None:
        """Deletes the fields of a run."""
        samples._dataset.delete_sample_fields(self.get_fields(samples, eval_key), error_level=1)
        samples._delete_empty_sidebar_group(eval_key)


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
    progress: Any = None,
) -> foues.SegmentationResults:
    """Scores predictions; samples without a prediction count as empty masks, samples without a truth not at all.

    Args:
        samples: A dataset or view.
        pred_field: The predictions.
        gt_field: The true masks.
        eval_key: Key under which the run is kept and shown in the App; None keeps nothing.
        protocol: `"standard"` or `"paper"`.
        metrics: Some of `METRICS` and `LIBRARY_METRICS`.
        heatmap_field: Mask probabilities to score with, or None.
        progress: As FiftyOne's `progress`.

    Returns:
        FiftyOne's results; `results.custom_metrics` holds the metrics, in percent, and `results.backend.unscored` why
        samples were left out (a lost file, a mask of another shape), by sample id.

    Raises:
        ValueError: If fields are missing or no sample has a true mask.
    """
    for name in filter(None, (pred_field, gt_field, heatmap_field)):
        if not samples.has_field(name):
            raise ValueError(f"field {name!r} is not in the dataset; give one of its fields.")
    if not samples.exists(gt_field).count():  # before a run of the same key is replaced
        raise ValueError(f"no sample has a mask in {gt_field!r}; give the field of the true masks.")
    try:
        return samples.evaluate_segmentations(
            pred_field,
            gt_field=gt_field,
            eval_key=eval_key,
            method=ConceptSegEvaluationConfig,
            protocol=protocol,
            metrics=metrics,
            ignore_field=IGNORE if samples.has_field(IGNORE) else None,
            heatmap_field=heatmap_field,
            progress=progress,
        )
    except Exception:
        if eval_key is not None and eval_key in samples.list_evaluations():
            samples._dataset.delete_evaluation(eval_key)  # else half a run would pass for a whole one
        raise


def report_of(samples: Any, eval_key: str) -> EvaluationReport:
    """The report of a kept run, by level and group, over the samples given.

    Raises:
        ValueError: If there is no such run.
    """
    if eval_key not in samples.list_evaluations():
        raise ValueError(f"there is no evaluation {eval_key!r}; run evaluate_concepts first.")
    config = samples.get_evaluation_info(eval_key).config
    records = list(_records(samples.match(F(f"{eval_key}_tp") != None), config, eval_key))  # noqa: E711
    settings = {"protocol": config.protocol, "metrics": config.metrics, "benchmark": samples._dataset.name}
    return EvaluationReport(records, settings)


def _records(samples: Any, config: Any, eval_key: str) -> Iterable[dict[str, Any]]:
    """The run's samples as the report takes them; what the dataset does not know is None."""
    pred = config.pred_field
    extra = [name for name in LIBRARY_METRICS if name in config.metrics]
    paths = {name: f"{eval_key}_{name}" for name in (*COUNTS, "mae", "iou", *extra)}
    paths |= {name: name for name in ("level", "group", "present", "episode")}
    paths |= {name: f"{pred}.{name}" for name in ("route", "decode_presence", "check_iou", "error")}
    known = {name: path for name, path in paths.items() if samples.has_field(path)}
    for name, kind in _OF_A_BENCHMARK.items():  # others may use these names for something else
        if name in known and not isinstance(samples.get_field(name), kind):
            del known[name]
    columns = dict(zip(known, samples.values(list(known.values()))))
    for values in zip(*columns.values()):
        value = dict.fromkeys(paths) | dict(zip(columns, values))
        presence = value["decode_presence"]
        yield {
            "sample_id": value["episode"],
            "level": value["level"] or "?",
            "group": value["group"] or "?",
            "present": (value["tp"] + value["fn"]) > 0 if value["present"] is None else value["present"],
            "route": value["route"],
            "decode_presence": presence,
            "rejected": presence is not None and presence < REJECTION_THRESHOLD,
            "foreground_iou": value["iou"],
            "scores": {name: value[name] for name in (*COUNTS, "mae", *extra)},
            "format_valid": None,
            "box_iou": None,
            "check_iou": value["check_iou"],
            "error": value["error"],
        }


def _share_of(name: str, score: dict[str, float]) -> float:
    if name == "iou":
        union = score["tp"] + score["fp"] + score["fn"]
        return score["tp"] / union if union else 1.0
    if name == "dice":
        area = 2 * score["tp"] + score["fp"] + score["fn"]
        return 2 * score["tp"] / area if area else 1.0
    return score[name]


def _probabilities(heatmap: fo.Heatmap, mask: np.ndarray) -> np.ndarray:
    """The map within 0 to 1, on the mask's side of 0.5 everywhere (8 bits on disk round)."""
    values = np.asarray(heatmap.get_map(), dtype=np.float64)
    if heatmap.map is None:
        values = values / 255
    return np.where(mask, np.clip(values, np.nextafter(0.5, 1), 1), np.clip(values, 0, 0.5))


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
