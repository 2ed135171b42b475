"""Operators `find_uncertain` and `show_references`."""

from __future__ import annotations

from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms

REASONS = {
    "presence": "Presence near the threshold",
    "check": "Check failed",
    "routes": "Routes disagree",
    "error": "Error",
}


class FindUncertain(foo.Operator):
    """Tags and shows samples with uncertain predictions."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "find_uncertain",
            "ConceptSeg: find uncertain samples",
            "Presence near the threshold, failed checks, errors, and routes that disagree",
            dynamic=True,
            allow_delegated_execution=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Find uncertain samples"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.integrations.fiftyone.schema import fields_of_type, prediction_fields

        predicted = prediction_fields(ctx.dataset)
        inputs.view_target(ctx, action_description="Search", require_flat=True)
        forms.choose_field(
            inputs,
            "field",
            predicted,
            "Predictions",
            "The dataset has no predictions; run segment_concept first.",
        )
        inputs.float("margin", default=0.1, min=0, max=1, label="Maximum distance of presence and threshold")
        inputs.float("check_iou", default=0.5, min=0, max=1, label="Check IoU below")
        masks = fields_of_type(ctx.dataset, fo.Segmentation)
        chosen = ctx.params.get("field") or next(iter(predicted), None)
        others = [name for name in predicted if name in masks and name != chosen]
        if chosen in masks:
            inputs.bool(
                "other_route",
                default=False,
                label="Also segment by the other route",
                description="Compares the masks of both routes; takes as long as another run",
                view=types.SwitchView(),
            )
        if others and not ctx.params.get("other_route"):
            choices = {"none": "None"} | {name: name for name in others}
            forms.dropdown(inputs, "other_field", choices, "none", "Compare with the masks of another run")
        if others or ctx.params.get("other_route"):
            inputs.float("routes_iou", default=0.5, min=0, max=1, label="Routes disagree below IoU")
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> dict[str, int]:
        """Tag and show the samples; return the counts."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone import find_uncertain, segment_other_route
        from conceptseg_hf.integrations.fiftyone.schema import other_route_field
        from conceptseg_hf.integrations.fiftyone.uncertainty import check_predictions

        get = ctx.params.get
        samples, field = forms.target_view(ctx), get("field") or "concept"
        other = get("other_field")
        if get("other_route"):
            check_predictions(samples, field, with_masks=True)  # before the long run
            for progress in segment_other_route(samples, field):
                ctx.set_progress(progress=progress.fraction, label=str(progress))
            other = other_route_field(field)
        uncertain = find_uncertain(
            samples,
            field=field,
            margin=get("margin", 0.1),
            check_iou=get("check_iou", 0.5),
            other_field=None if other in (None, "none") else other,
            routes_iou=get("routes_iou", 0.5),
        )
        ids = list(dict.fromkeys(sample_id for ids in uncertain.values() for sample_id in ids))
        if not ctx.delegated:
            ctx.ops.reload_dataset()
        if ids and not ctx.delegated:
            ctx.ops.set_view(view=ctx.dataset.select(ids))
        return {"total": len(ids), **{reason: len(uncertain.get(reason, ())) for reason in REASONS}}

    def resolve_output(self, ctx: Any) -> types.Property:
        """Show the counts."""
        outputs = types.Object()
        outputs.int("total", label="Samples to review")
        for reason, label in REASONS.items():
            outputs.int(reason, label=label)
        return types.Property(outputs, view=types.View(label="Uncertain samples"))


class ShowReferences(foo.Operator):
    """Shows targets next to their references."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "show_references",
            "ConceptSeg: show references next to targets",
            "Shows the selected samples, or the open sample, each preceded by its own references",
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form, which has no inputs but may show a warning."""
        inputs = types.Object()
        if not ctx.dataset.has_field("reference_ids"):
            forms.warn(
                inputs,
                "missing",
                "The dataset has no field reference_ids; load a benchmark that has references.",
            )
        elif not _chosen(ctx):
            forms.warn(inputs, "empty", "No sample is selected or open; select targets in the grid.")
        return forms.form(inputs, "Show references next to targets")

    def execute(self, ctx: Any) -> None:
        """Set the view."""
        from conceptseg_hf.integrations.fiftyone import view_with_references

        ctx.ops.set_view(view=view_with_references(ctx.dataset, _chosen(ctx)))


def _chosen(ctx: Any) -> list[str]:
    return list(ctx.selected) or ([ctx.current_sample] if ctx.current_sample else [])
