"""Operator `evaluate_concepts`."""

from __future__ import annotations

import time
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms

PROTOCOLS = {
    "standard": "Standard: at the image size",
    "paper": "Paper: thresholded at 600 x 600",
    "released": "Released: comparable with the paper's figures",
}


class EvaluateConcepts(foo.Operator):
    """Evaluates predicted masks against the ground truth."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "evaluate_concepts",
            "ConceptSeg: evaluate masks",
            "Segmentation metrics per sample, level and group; missing predictions count as empty masks",
            dynamic=True,
            allow_delegated_execution=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Evaluate masks"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.integrations.fiftyone.evaluation import check_eval_key
        from conceptseg_hf.integrations.fiftyone.schema import fields_of_type

        predicted, masks = _fields(ctx.dataset)
        settings = _settings(ctx)
        inputs.view_target(ctx, action_description="Evaluate", require_flat=True)
        forms.choose_field(
            inputs,
            "pred_field",
            predicted,
            "Predictions",
            "The dataset has no field with masks; run segment_concept first.",
            "concept",
        )
        forms.choose_field(
            inputs,
            "gt_field",
            masks,
            "Ground-truth masks",
            "The dataset has no field with masks; add ground-truth masks.",
            "ground_truth",
        )
        _add_class_input(inputs, ctx.dataset, settings["gt_field"], settings["gt_class"])
        inputs.str("eval_key", default="concepts", label="Run name")
        forms.dropdown(inputs, "protocol", PROTOCOLS, "standard", "Protocol")
        inputs.bool(
            "all_metrics",
            default=False,
            label="Add weighted F-measure and S-measure",
            description="Slower; requires: pip install 'conceptseg-hf[eval]'",
            view=types.SwitchView(),
        )
        heatmaps = fields_of_type(ctx.dataset, fo.Heatmap)
        if heatmaps:
            choices = {"none": "None (masks only)"} | {name: name for name in heatmaps}
            forms.dropdown(
                inputs, "heatmap_field", choices, "none", "Probabilities for MAE, F_w and S-measure"
            )
        key = settings["eval_key"]
        try:
            check_eval_key(
                ctx.dataset, key, settings["pred_field"], settings["gt_field"], settings["metrics"]
            )
        except ValueError as error:
            forms.warn(inputs, "bad_key", str(error))
        else:
            if key in ctx.dataset.list_evaluations():
                message = f"Run {key!r} already exists and will be replaced."
                forms.warn(inputs, "overwrite", message, blocks=False)
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> dict[str, Any]:
        """Evaluate; return the metrics and the tables to show."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone import evaluate_concepts
        from conceptseg_hf.integrations.fiftyone.evaluation import left_out_of, report_of

        samples, settings, started = forms.target_view(ctx), _settings(ctx), time.monotonic()
        key = settings["eval_key"]
        results = evaluate_concepts(
            samples,
            **settings,
            progress=fo.report_progress(lambda bar: _report(ctx, bar, started), dt=2.0),
        )
        if not ctx.delegated:
            ctx.ops.reload_dataset()
        report = report_of(samples, key)
        left_out = _left_out(samples._dataset, left_out_of(samples, key), results.backend.unscored)
        return {
            "eval_key": key,
            "metrics": {metric["key"]: metric["value"] for metric in results.custom_metrics.values()},
            "summary": f"{report.summary()} ({len(report.records)} of {samples.count()} samples)",
            "table": [metrics_row(row) for row in report.table],
            "left_out": left_out,
        }

    def resolve_output(self, ctx: Any) -> types.Property:
        """Show the metrics by level and group, and the skipped samples."""
        outputs = types.Object()
        outputs.str("summary", label="Summary")
        table = types.TableView(label="By level and group")
        for key, label in METRIC_COLUMNS.items():
            table.add_column(key, label=label)
        outputs.list("table", types.Object(), view=table)
        if (ctx.results or {}).get("left_out"):
            table = types.TableView(label="Skipped samples")
            for name, label in {"why": "Reason", "samples": "n", "files": "Files"}.items():
                table.add_column(name, label=label)
            outputs.list("left_out", types.Object(), view=table)
        return types.Property(outputs, view=types.View(label="Evaluation"))


def _fields(dataset: fo.Dataset) -> tuple[list[str], list[str]]:
    """Return the fields that can be predictions, and those that can be ground-truth masks."""
    from conceptseg_hf.integrations.fiftyone.schema import fields_of_type, prediction_fields

    masks = fields_of_type(dataset, fo.Segmentation)
    predicted = [name for name in prediction_fields(dataset) if name in masks]
    return predicted or [name for name in masks if name != "ground_truth"], masks


def _settings(ctx: Any) -> dict[str, Any]:
    """Return the arguments of `evaluate_concepts`, which the form checks and `execute` uses."""
    from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS

    get = ctx.params.get
    predicted, masks = _fields(ctx.dataset)
    heatmap, gt_class = get("heatmap_field"), get("gt_class")
    return {
        "pred_field": get("pred_field") or _first(predicted, "concept"),
        "gt_field": get("gt_field") or _first(masks, "ground_truth"),
        "eval_key": get("eval_key") or "concepts",
        "protocol": get("protocol") or "standard",
        "metrics": (*METRICS, *LIBRARY_METRICS) if get("all_metrics") else METRICS,
        "heatmap_field": None if heatmap in (None, "none") else heatmap,
        "gt_class": None if gt_class in (None, "") else int(gt_class),
    }


def _first(fields: list[str], default: str) -> str:
    """Return the field that a dropdown selects by default."""
    return default if default in fields or not fields else fields[0]


def _add_class_input(inputs: types.Object, dataset: fo.Dataset, gt_field: str, gt_class: int | None) -> None:
    """Add an input for the class in the ground-truth masks: a class from `mask_targets`, or any pixel value."""
    from conceptseg_hf.integrations.fiftyone.gt_masks import check_class, classes_of

    label = "Concept in the ground-truth masks"
    classes = classes_of(dataset, gt_field)
    if classes:
        choices = {value: f"{name} ({value})" for value, name in classes.items()}
        forms.dropdown(inputs, "gt_class", choices, None, label)
    else:
        inputs.int(
            "gt_class",
            label=f"{label}: pixel value",
            description="Leave empty to use all non-background pixels",
        )
    try:
        check_class(dataset, gt_field, gt_class)
    except ValueError as error:
        forms.warn(inputs, "class_missing", str(error))


METRIC_COLUMNS = {
    "level": "Level",
    "group": "Group",
    "samples": "n",
    "foreground_iou": "fg IoU",
    "giou": "gIoU",
    "ciou": "cIoU",
    "shortcut": "Shortcut",
}


def metrics_row(row: dict[str, Any]) -> dict[str, Any]:
    """Format a row of a report's table: fg IoU and fraction of shortcuts from 0 to 1, gIoU and cIoU in percent."""
    values = {"level": row["level"], "group": row["group"], "samples": row["samples"]}
    values |= {name: _number(row["masks"].get(name), 1) for name in ("giou", "ciou")}
    return values | {
        "foreground_iou": _number(row["foreground_iou"], 3),
        "shortcut": _number(row["shortcut_share"], 2),
    }


def _report(ctx: Any, bar: Any, started: float) -> None:
    from conceptseg_hf.integrations.fiftyone.progress import time_left

    left = time_left(bar.iteration, bar.total, started)
    label = ", ".join(filter(None, [f"{bar.iteration} of {bar.total} samples", left]))
    ctx.set_progress(progress=bar.progress, label=label)


def _left_out(
    dataset: fo.Dataset, left_out: dict[str, list[str]], errors: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the table rows of the skipped samples, one per reason or error message."""
    ids_by_reason: dict[str, list[str]] = {}
    for reason, ids in left_out.items():
        for sample_id in ids:
            ids_by_reason.setdefault(errors.get(sample_id, reason), []).append(sample_id)
    return [
        {
            "why": forms.sentence(reason),
            "samples": len(ids),
            "files": forms.named(dataset.select(ids).values("filepath")),
        }
        for reason, ids in ids_by_reason.items()
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
