"""Operators `segment_concept`, and `release_model`, which removes the cached model from memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms, runs

REFERENCES = {
    "none": "None (prompt only)",
    "selected": "The selected samples",
    "saved_view": "A saved view",
    "own": "Each sample's own (field reference_ids)",
}


class SegmentConcept(foo.Operator):
    """Segments the concept of a prompt in every sample of a view."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "segment_concept",
            "ConceptSeg: segment a concept",
            "Masks, rules and routes for the concept of a prompt, optionally with reference samples",
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
        )

    def resolve_placement(self, ctx: Any) -> types.Placement:
        """Place a button above the sample grid."""
        return types.Placement(
            types.Places.SAMPLES_GRID_ACTIONS,
            types.Button(
                label="Segment a concept",
                icon="/assets/icon-light.svg",
                light_icon="/assets/icon-light.svg",
                dark_icon="/assets/icon-dark.svg",
                prompt=True,
            ),
        )

    def resolve_execution_options(self, ctx: Any) -> foo.ExecutionOptions:
        """Allow immediate and scheduled execution; scheduling is the default for large runs."""
        return runs.execution_options(ctx)

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Segment a concept"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        try:
            job, fault = job_of(ctx), None
        except ValueError as error:
            job, fault = None, str(error)
        if fault is None and reference_source(ctx) == "selected" and not ctx.selected:
            fault = "no sample is selected; select references in the grid."
        runs.add_summary(inputs, ctx, job, fault)
        _add_prompt_inputs(inputs, ctx)
        _add_reference_inputs(inputs, ctx)
        inputs.view_target(
            ctx,
            action_description="Segment",
            allow_selected_samples=reference_source(ctx) != "selected",
            require_flat=True,
        )
        _add_model_inputs(inputs, ctx)
        runs.add_output_inputs(inputs, ctx, job)
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Segment; the predictions are saved after each batch."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        yield from runs.execute(ctx, lambda: job_of(ctx))


class ReleaseModel(foo.Operator):
    """Removes the shared model from memory."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "release_model", "ConceptSeg: free the model", "Removes the model that runs share from memory"
        )

    def execute(self, ctx: Any) -> dict[str, int]:
        """Release the model; return the number of released models."""
        from conceptseg_hf.integrations.fiftyone import release_models

        count = release_models()
        ctx.ops.notify(
            "The model was removed from memory." if count else "No model was in memory.", variant="success"
        )
        return {"released": count}

    def resolve_output(self, ctx: Any) -> types.Property:
        """Show the count."""
        outputs = types.Object()
        outputs.int("released", label="Released models")
        return types.Property(outputs)


def reference_source(ctx: Any) -> str:
    """Return the source of the references; by default the selected samples, if there are any."""
    chosen = ctx.params.get("references")
    if chosen in REFERENCES:
        return chosen
    return "selected" if ctx.selected else "none"


def prompt_source(ctx: Any) -> str:
    """Return the source of the prompt, `"text"` or `"field"`."""
    chosen = ctx.params.get("prompt_source")
    if chosen is not None:
        return chosen
    return "field" if ctx.params.get("prompt_field") and not ctx.params.get("prompt") else "text"


def reference_samples(ctx: Any) -> Any:
    """Return the samples that are references for all targets, or None."""
    source = reference_source(ctx)
    if source == "selected":
        return ctx.dataset.select(ctx.selected, ordered=True)
    name = ctx.params.get("saved_view")
    if source == "saved_view" and name in ctx.dataset.list_saved_views():
        return ctx.dataset.load_saved_view(name)
    return None


def job_of(ctx: Any) -> Any:
    """Create a `SegmentationJob` from the form's values.

    Raises:
        ValueError: If the saved view does not exist or is empty.
    """
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    get = ctx.params.get
    source = reference_source(ctx)
    samples = reference_samples(ctx)
    if source == "saved_view" and samples is None:
        raise ValueError(
            f"saved view {get('saved_view')!r} is not in the dataset; use one of its saved views."
        )
    if samples is not None and source == "saved_view" and not samples.count():
        raise ValueError(f"saved view {get('saved_view')!r} is empty; use one that contains the references.")
    from_field, label_field = prompt_source(ctx) == "field", label_field_of(ctx)
    return SegmentationJob(
        field=get("field") or "concept",
        prompt=None if from_field else get("prompt"),
        prompt_field=get("prompt_field") if from_field else None,
        reference_ids=[] if samples is None else samples.values("id"),
        reference_ids_field="reference_ids" if source == "own" else None,
        reference_label_field=label_field,
        reference_label_ids=[] if samples is None else _filtered_labels(samples, label_field),
        proxy=get("proxy", True),
        boxes_together=get("boxes_together", False),
        checkpoint=get("checkpoint") or "nano",
        router=get("router") or "adaptive",
        outputs=runs.outputs_of(ctx),
        label=(get("label") or "").strip() or None,
        skip_existing=runs.skip_existing(ctx),
        batch_size=get("batch_size") or 8,
    )


def label_field_of(ctx: Any) -> str | None:
    """Return the field that marks the concept in references, or None for images without marks."""
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO

    chosen = ctx.params.get("reference_label_field") or AUTO
    if chosen == NO_MARK:
        return None
    return _most_likely_label_field(ctx) if chosen == AUTO else chosen


def _most_likely_label_field(ctx: Any) -> str | None:
    from conceptseg_hf.integrations.fiftyone.reference_samples import (
        AUTO,
        count_marked,
        resolve_label_field,
    )

    samples = reference_samples(ctx)
    ids = [] if samples is None else samples.values("id")
    field = resolve_label_field(ctx.dataset, AUTO, ids)
    return field if field is None or not ids or count_marked(ctx.dataset, ids, field) else None


def _filtered_labels(samples: Any, label_field: str | None) -> list[str]:
    """Return the ids of the boxes that a view of references shows if it filters them, else an empty list."""
    if label_field is None or not samples.has_field(f"{label_field}.detections"):
        return []
    path = f"{label_field}.detections.id"
    shown_ids = samples.values(path, unwind=True)
    all_ids = samples._dataset.select(samples.values("id")).values(path, unwind=True)
    return shown_ids if len(shown_ids) < len(all_ids) else []


NO_MARK = "none"


def _add_prompt_inputs(inputs: types.Object, ctx: Any) -> None:
    from conceptseg_hf.integrations.fiftyone.schema import text_fields

    fields = text_fields(ctx.dataset)
    tabs = types.TabsView()
    tabs.add_choice("text", label="One prompt for all")
    tabs.add_choice("field", label="Prompts in a field")
    inputs.enum("prompt_source", ["text", "field"], default="text", view=tabs)
    if prompt_source(ctx) == "text":
        inputs.str(
            "prompt",
            label="Prompt",
            description='The concept in words, such as "red circle" or "the same defect"',
        )
        return
    forms.choose_field(
        inputs,
        "prompt_field",
        fields,
        "Prompt field",
        "The dataset has no string field; add one with a prompt for each sample.",
        "prompt",
    )


def _add_reference_inputs(inputs: types.Object, ctx: Any) -> None:
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO, reference_label_fields

    choices = dict(REFERENCES)
    choices["selected"] += f" ({len(ctx.selected)})"
    if not ctx.dataset.has_field("reference_ids"):
        del choices["own"]
    forms.dropdown(inputs, "references", choices, reference_source(ctx), "References")
    source = reference_source(ctx)
    if source == "none":
        return
    if source == "saved_view":
        forms.choose_field(
            inputs,
            "saved_view",
            ctx.dataset.list_saved_views(),
            "Saved view",
            "The dataset has no saved view; save one that contains the references.",
        )
    automatic = _most_likely_label_field(ctx) or "none (images without marks)"
    marks = {AUTO: f"Automatic: {automatic}"} | {name: name for name in reference_label_fields(ctx.dataset)}
    forms.dropdown(
        inputs,
        "reference_label_field",
        marks | {NO_MARK: "None (images without marks)"},
        AUTO,
        "Boxes or masks that mark the concept",
    )
    inputs.bool(
        "proxy",
        default=True,
        label="Proxy query",
        description="Withhold the box of the first reference: the model must find it, which checks its rule",
        view=types.SwitchView(),
    )
    inputs.bool(
        "boxes_together",
        default=False,
        label="All boxes of an image in one reference",
        description="Create one reference for an image with several boxes, instead of one reference per box",
        view=types.SwitchView(),
    )


def _add_model_inputs(inputs: types.Object, ctx: Any) -> None:
    from conceptseg_hf.integrations.fiftyone.schema import ROUTERS

    forms.checkpoint(inputs)
    forms.dropdown(inputs, "router", ROUTERS, "adaptive", "Router")
