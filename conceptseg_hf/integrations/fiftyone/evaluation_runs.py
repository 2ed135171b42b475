"""Stored evaluation runs: their reports, masks that were replaced afterwards, and samples without a score."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import fiftyone as fo
import fiftyone.utils.eval.segmentation as foues
from fiftyone import ViewField as F

from ...evaluation.metrics import LIBRARY_METRICS
from ...evaluation.records import REJECTION_THRESHOLD
from ...evaluation.reporting.report import EvaluationReport
from .schema import REFERENCE, whole_dataset

COUNTS = ("tp", "fp", "fn", "tn")
_BENCHMARK_FIELDS = {
    "level": fo.StringField,
    "group": fo.StringField,
    "episode": fo.StringField,
    "present": fo.BooleanField,
}
_LABEL_ATTRIBUTES = ("route", "decode_presence", "check_iou", "error")


def report_of(samples: Any, eval_key: str) -> EvaluationReport:
    """Return the report of a stored run, by level and group, for the given samples.

    If a mask was replaced after the evaluation (see `replaced_since`), the report contains the scores of the old mask
    and omits the attributes of the new label (route, presence, check IoU, error).

    Raises:
        ValueError: If the run does not exist or is not finished.
    """
    replaced = set(replaced_since(samples, eval_key))
    config = samples.get_evaluation_info(eval_key).config
    records = list(_records(_scored(samples, eval_key), config, eval_key, replaced))
    settings = {"protocol": config.protocol, "metrics": config.metrics, "benchmark": samples._dataset.name}
    return EvaluationReport(records, settings)


def replaced_since(samples: Any, eval_key: str) -> list[str]:
    """Return the ids of the samples with a prediction or ground-truth mask that was replaced after a run scored it.

    Raises:
        ValueError: If the run does not exist or is not finished.
    """
    results = _results_of(samples, eval_key)
    config = samples.get_evaluation_info(eval_key).config
    scored = set(zip(results.ytrue_ids, results.ypred_ids))
    paths = ["id", f"{config.gt_field}.id", f"{config.pred_field}.id"]
    return [
        sample_id
        for sample_id, *label_ids in zip(*_scored(samples, eval_key).values(paths))
        if tuple(label_ids) not in scored
    ]


def left_out_of(samples: Any, eval_key: str) -> dict[str, list[str]]:
    """Return the ids of the samples that a stored run did not score, by reason; reasons without samples are omitted.

    Raises:
        ValueError: If the run does not exist.
    """
    _check_exists(samples, eval_key)
    gt_field = samples.get_evaluation_info(eval_key).config.gt_field
    rest = _with_all_fields(samples).match(F(f"{eval_key}_tp") == None)  # noqa: E711 (FiftyOne expression)
    without_mask, rest = rest.exists(gt_field, False), rest.exists(gt_field)
    is_reference = F("role") == REFERENCE
    reasons = {
        f"references without a mask in {gt_field!r}": without_mask.match(is_reference).values("id"),
        f"without a mask in {gt_field!r}": without_mask.match(~is_reference).values("id"),
        "could not be scored": rest.values("id"),
    }
    return {reason: ids for reason, ids in reasons.items() if ids}


def _results_of(samples: Any, eval_key: str) -> foues.SegmentationResults:
    _check_exists(samples, eval_key)
    results = samples.load_evaluation_results(eval_key)
    if results is None:  # still running, or killed
        raise ValueError(
            f"evaluation {eval_key!r} is not finished; wait for it, or run it again with the same name."
        )
    return results


def _scored(samples: Any, eval_key: str) -> Any:
    """Return the samples that the run scored."""
    return _with_all_fields(samples).match(F(f"{eval_key}_tp") != None)  # noqa: E711 (FiftyOne expression)


def _with_all_fields(samples: Any) -> Any:
    """Return the samples with all of their fields, since a view may hide some."""
    if isinstance(samples, fo.Dataset):
        return samples
    return whole_dataset(samples).select(samples.values("id"))


def _check_exists(samples: Any, eval_key: str) -> None:
    if eval_key not in samples.list_evaluations():
        raise ValueError(f"evaluation {eval_key!r} does not exist; run evaluate_concepts first.")


def _records(samples: Any, config: Any, eval_key: str, replaced: Collection[str]) -> Iterable[dict[str, Any]]:
    """Yield the scored samples as records for `EvaluationReport`; values that the dataset lacks are None."""
    pred = config.pred_field
    extra = [name for name in LIBRARY_METRICS if name in config.metrics]
    paths = {name: f"{eval_key}_{name}" for name in (*COUNTS, "mae", "iou", *extra)}
    paths |= {name: name for name in ("level", "group", "present", "episode")}
    paths |= {name: f"{pred}.{name}" for name in _LABEL_ATTRIBUTES} | {"id": "id"}
    known = {name: path for name, path in paths.items() if samples.has_field(path)}
    for name, kind in _BENCHMARK_FIELDS.items():  # user fields may have the same names but other types
        if name in known and not isinstance(samples.get_field(name), kind):
            del known[name]
    if not samples.has_field("benchmark"):
        known.pop("present", None)
    columns = dict(zip(known, samples.values(list(known.values()))))
    for values in zip(*columns.values()):
        value: dict[str, Any] = dict.fromkeys(paths) | dict(zip(columns, values))
        if value["id"] in replaced:
            value |= dict.fromkeys(_LABEL_ATTRIBUTES)
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
