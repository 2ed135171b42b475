"""Evaluations that a dataset keeps: their report, what was replaced since, and what they left out."""

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
_OF_A_BENCHMARK = {
    "level": fo.StringField,
    "group": fo.StringField,
    "episode": fo.StringField,
    "present": fo.BooleanField,
}
_OF_A_LABEL = ("route", "decode_presence", "check_iou", "error")


def report_of(samples: Any, eval_key: str) -> EvaluationReport:
    """The report of a kept run, by level and group, over the samples given.

    Where a mask was replaced since (`replaced_since`), the scores are of the old one, and what the label says of its
    making (route, presence, check, error) is left out.

    Raises:
        ValueError: If there is no such run, or it is not finished.
    """
    replaced = set(replaced_since(samples, eval_key))
    config = samples.get_evaluation_info(eval_key).config
    records = list(_records(_scored(samples, eval_key), config, eval_key, replaced))
    settings = {"protocol": config.protocol, "metrics": config.metrics, "benchmark": samples._dataset.name}
    return EvaluationReport(records, settings)


def replaced_since(samples: Any, eval_key: str) -> list[str]:
    """Ids of the samples whose prediction or true mask is another than a kept run has scored.

    Raises:
        ValueError: If there is no such run, or it is not finished.
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
    """Ids of the samples that a kept run has not scored, by the reason; only reasons that occur.

    Raises:
        ValueError: If there is no such run.
    """
    _check_there(samples, eval_key)
    gt_field = samples.get_evaluation_info(eval_key).config.gt_field
    rest = _with_all_fields(samples).match(F(f"{eval_key}_tp") == None)  # noqa: E711 (an expression of FiftyOne)
    without, rest = rest.exists(gt_field, False), rest.exists(gt_field)
    is_reference = F("role") == REFERENCE
    reasons = {
        f"references without a mask in {gt_field!r}": without.match(is_reference).values("id"),
        f"without a mask in {gt_field!r}": without.match(~is_reference).values("id"),
        "could not be scored": rest.values("id"),
    }
    return {reason: ids for reason, ids in reasons.items() if ids}


def _results_of(samples: Any, eval_key: str) -> foues.SegmentationResults:
    _check_there(samples, eval_key)
    results = samples.load_evaluation_results(eval_key)
    if results is None:  # it is running, or was killed
        raise ValueError(
            f"evaluation {eval_key!r} is not finished; wait for it, or run it again under the same name."
        )
    return results


def _scored(samples: Any, eval_key: str) -> Any:
    """The samples that the run scored."""
    return _with_all_fields(samples).match(F(f"{eval_key}_tp") != None)  # noqa: E711 (an expression of FiftyOne)


def _with_all_fields(samples: Any) -> Any:
    """The samples with all their fields, as views may hide some."""
    if isinstance(samples, fo.Dataset):
        return samples
    return whole_dataset(samples).select(samples.values("id"))


def _check_there(samples: Any, eval_key: str) -> None:
    if eval_key not in samples.list_evaluations():
        raise ValueError(f"there is no evaluation {eval_key!r}; run evaluate_concepts first.")


def _records(samples: Any, config: Any, eval_key: str, replaced: Collection[str]) -> Iterable[dict[str, Any]]:
    """The run's samples as the report takes them; what the dataset does not know is None."""
    pred = config.pred_field
    extra = [name for name in LIBRARY_METRICS if name in config.metrics]
    paths = {name: f"{eval_key}_{name}" for name in (*COUNTS, "mae", "iou", *extra)}
    paths |= {name: name for name in ("level", "group", "present", "episode")}
    paths |= {name: f"{pred}.{name}" for name in _OF_A_LABEL} | {"id": "id"}
    known = {name: path for name, path in paths.items() if samples.has_field(path)}
    for name, kind in _OF_A_BENCHMARK.items():  # others may use these names for something else
        if name in known and not isinstance(samples.get_field(name), kind):
            del known[name]
    if not samples.has_field("benchmark"):
        known.pop("present", None)
    columns = dict(zip(known, samples.values(list(known.values()))))
    for values in zip(*columns.values()):
        value: dict[str, Any] = dict.fromkeys(paths) | dict(zip(columns, values))
        if value["id"] in replaced:
            value |= dict.fromkeys(_OF_A_LABEL)
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
