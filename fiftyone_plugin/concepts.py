"""Operators `induce_concept`, `edit_concept` and `apply_concept`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms, runs

PHRASE_SEPARATOR = "|"  # also between the phrases of a combination in the scores
_MAX_SHOWN_CANDIDATES = 10


class InduceConcept(foo.Operator):
    """Induces a concept from the selected samples."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "induce_concept",
            "ConceptSeg: induce a concept",
            "Finds the phrases and the rule that explain the selected samples, and stores them with the dataset",
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Induce a concept"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO

        try:
            job = _induction(ctx)
            job.check(ctx.dataset)
        except (ValueError, OSError) as error:
            forms.warn(inputs, "fault", str(error))
        else:
            message = (
                f"The concept {job.stored_name!r} will be induced from {len(job.reference_ids)} samples, in which "
                f"{job.label_field(ctx.dataset)!r} marks it."
            )
            inputs.view("summary", types.Notice(label=message))
        inputs.str(
            "prompt", label="Prompt", description='The concept in words, such as "scratch" or "the defect"'
        )
        inputs.str("name", label="Name in the concept library", description="Default: the prompt")
        _add_label_field(inputs, ctx, AUTO)
        views = ctx.dataset.list_saved_views()
        if views:
            choices = {"none": "None"} | {name: name for name in views}
            forms.dropdown(
                inputs,
                "negatives",
                choices,
                "none",
                "Samples without the concept (a saved view)",
                description="Set the presence from which the concept is accepted",
            )
        inputs.int("num_samples", default=1, min=1, label="Completions per reference")
        inputs.bool(
            "refine",
            default=False,
            label="Tune tokens on the references",
            description="For concepts without a name; requires two references",
            view=types.SwitchView(),
        )
        forms.checkpoint(inputs)
        inputs.bool(
            "replace", default=False, label="Replace a concept of the same name", view=types.SwitchView()
        )
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Induce the concept, store it, and show how well it explains the references."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone import induce_concept

        yield from _store_and_show(
            ctx, lambda report: induce_concept(ctx.dataset, _induction(ctx), progress=report)
        )


class EditConcept(foo.Operator):
    """Edits the rule or the phrases of a concept, and verifies it on its references."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "edit_concept",
            "ConceptSeg: edit a concept",
            "Changes the rule or the phrases of a concept and verifies it on its references",
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Edit a concept"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.integrations.fiftyone.checkpoints import fault_of_concept
        from conceptseg_hf.integrations.fiftyone.concept_library import load_concept
        from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO

        name = choose_concept(inputs, ctx)
        if name is None:
            return forms.form(inputs, label)
        stored = None
        try:
            stored = load_concept(ctx.dataset, name)
            edited = _edit(ctx, name).resolved(ctx.dataset)
            fault = fault_of_concept(edited.concept, edited.checkpoint)
        except (ValueError, OSError) as error:
            fault = str(error)
        if fault is not None:
            forms.warn(inputs, "fault", fault)
        else:
            message = f"The concept is verified on {len(edited.reference_ids)} references."
            inputs.view("summary", types.Notice(label=message))
        if stored is None:
            return forms.form(inputs, label)
        concept = stored.concept
        inputs.str(
            _keyed("rule", name),
            default=concept.rule or "",
            label="Rule",
            description="If only the rule is edited, its noun phrases replace the phrases below if SAM 3 explains the "
            "references better with them",
        )
        inputs.str(
            _keyed("phrases", name),
            default=f" {PHRASE_SEPARATOR} ".join(concept.phrases),
            label="Phrases for SAM 3",
            description=f"Separated by {PHRASE_SEPARATOR}; each image uses the phrase with the highest presence",
        )
        if ctx.selected:
            inputs.bool(
                "use_selected",
                default=False,
                label=f"Verify on the selected samples ({len(ctx.selected)})",
                view=types.SwitchView(),
            )
            if ctx.params.get("use_selected"):
                _add_label_field(inputs, ctx, AUTO)
        inputs.str(_keyed("checkpoint", name), default=stored.checkpoint, label="Checkpoint")
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Edit and verify the concept, and show how well it explains the references."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone import edit_concept

        yield from _store_and_show(
            ctx, lambda report: edit_concept(ctx.dataset, _edit(ctx, named_concept(ctx)))
        )


class ApplyConcept(foo.Operator):
    """Applies a concept of the library to every sample of a view."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "apply_concept",
            "ConceptSeg: apply a concept",
            "Masks for a concept of the library, without the VLM where SAM 3 is sure",
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
        )

    def resolve_execution_options(self, ctx: Any) -> foo.ExecutionOptions:
        """Allow immediate and scheduled execution; scheduling is the default for large runs."""
        return runs.execution_options(ctx)

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Apply a concept"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.integrations.fiftyone.concept_library import default_field, load_concept
        from conceptseg_hf.integrations.fiftyone.concepts import summary_of
        from conceptseg_hf.integrations.fiftyone.schema import CONCEPT_ROUTERS

        name = choose_concept(inputs, ctx)
        if name is None:
            return forms.form(inputs, label)
        try:
            stored, job, fault = load_concept(ctx.dataset, name), _job(ctx, name), None
        except ValueError as error:
            forms.warn(inputs, "fault", str(error))
            return forms.form(inputs, label)
        runs.add_summary(inputs, ctx, job, fault)
        inputs.view("concept_summary", types.Notice(label=summary_of(ctx.dataset, stored)))
        inputs.view_target(
            ctx,
            action_description="Segment",
            allow_selected_samples=not set(ctx.selected) <= set(job.reference_ids),
            require_flat=True,
        )
        forms.dropdown(inputs, "router", CONCEPT_ROUTERS, job.router, "Router")
        references = stored.present_references(ctx.dataset)
        if references:
            inputs.bool(
                "use_references",
                default=True,
                label=f"Reason with the references of the concept ({len(references)})",
                description="They are not segmented",
                view=types.SwitchView(),
            )
        inputs.str(_keyed("checkpoint", name), default=job.checkpoint, label="Checkpoint")
        field = ctx.params.get("field") or default_field(name)
        runs.add_output_inputs(inputs, ctx, job, field, _keyed("field", name))
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Apply the concept; the predictions are saved after each batch."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        yield from runs.execute(ctx, lambda: _job(ctx, named_concept(ctx)))


def choose_concept(inputs: types.Object, ctx: Any) -> str | None:
    """Add a dropdown of the library and return the chosen concept, or a warning and None if there is none."""
    from conceptseg_hf.integrations.fiftyone.concept_library import concept_names

    names = concept_names(ctx.dataset)
    chosen = ctx.params.get("concept") or next(iter(names), None)
    if not names:
        message = "The library of this dataset has no concepts; run induce_concept, or import the file of a concept."
        forms.warn(inputs, "none", message)
        return None
    if chosen not in names:
        message = f"Concept {chosen!r} is not in the library of this dataset; choose another one."
        forms.warn(inputs, "unknown", message)
        chosen = names[0]
    forms.dropdown(inputs, "concept", {name: name for name in names}, chosen, "Concept")
    return chosen


def named_concept(ctx: Any) -> str:
    """Return the concept that an operator processes; by default the only one of the library.

    Raises:
        ValueError: If no concept is given, and the library has none or several.
    """
    from conceptseg_hf.integrations.fiftyone import concept_names

    name, names = ctx.params.get("concept"), concept_names(ctx.dataset)
    if name:
        return name
    if len(names) != 1:
        known = (
            f"use one of {', '.join(map(repr, names))}" if names else "the library of this dataset is empty"
        )
        raise ValueError(f"no concept is given; {known}.")
    return names[0]


def rerun_params(ctx: Any, name: str) -> dict[str, Any]:
    """Return the parameters of `apply_concept` that repeat the last run of a concept, or only choose the concept."""
    from conceptseg_hf.integrations.fiftyone import last_settings
    from conceptseg_hf.integrations.fiftyone.schema import OUTPUTS

    settings = last_settings(ctx.dataset, name)
    outputs = settings.pop("outputs", None)
    params = {"concept": name} | {key: value for key, value in settings.items() if value is not None}
    return params if outputs is None else params | {output: output in outputs for output in OUTPUTS}


def results_of(ctx: Any, stored: Any) -> tuple[types.Object, dict[str, Any]]:
    """Return the outputs that describe a concept, and their values."""
    from conceptseg_hf.integrations.fiftyone.concepts import reference_scores, summary_of

    concept, outputs = stored.concept, types.Object()
    outputs.view("summary", types.Notice(label=summary_of(ctx.dataset, stored)))
    outputs.str("rule", label="Rule", view=types.LabelValueView(read_only=True))
    outputs.str("phrases", label="Phrases", view=types.LabelValueView(read_only=True))
    rows = reference_scores(ctx.dataset, stored)
    values = {
        "rule": concept.rule or "-",
        "phrases": f" {PHRASE_SEPARATOR} ".join(concept.phrases) or "-",
        "references": [{"file": row["file"], "iou": f"{row['iou']:.2f}"} for row in rows],
        "candidates": [
            {"name": row.name, "score": f"{row.score:.2f}"} for row in concept.scores[:_MAX_SHOWN_CANDIDATES]
        ],
    }
    for name, label, columns in (
        ("references", "References", {"file": "File", "iou": "IoU"}),
        ("candidates", "Candidates", {"name": "Phrase", "score": "Mean IoU"}),
    ):
        table = types.TableView(label=label)
        for key, title in columns.items():
            table.add_column(key, label=title)
        outputs.list(name, types.Object(), view=table)
    params = rerun_params(ctx, stored.name)
    label = "Run again with this concept" if len(params) > 1 else "Apply this concept"
    button = types.Button(label=label, operator=f"{forms.PLUGIN}/apply_concept", params=params, prompt=True)
    outputs.view("apply", button)
    return outputs, values


def _store_and_show(ctx: Any, make: Callable[[Callable[[int, int, str], None]], Any]) -> Iterator[Any]:
    """Make and store a concept in a thread, and show how well it explains the references; errors are shown, too."""
    try:
        stored = yield from forms.in_background(ctx, make)
    except Exception as error:
        yield from forms.notified(ctx, error)
    if ctx.delegated:
        return
    outputs, values = results_of(ctx, stored)
    yield ctx.ops.show_output(types.Property(outputs).to_json(), values)


def _add_label_field(inputs: types.Object, ctx: Any, default: str) -> None:
    from conceptseg_hf.integrations.fiftyone.reference_samples import (
        reference_label_fields,
        resolve_label_field,
    )

    automatic = resolve_label_field(ctx.dataset, default, ctx.selected) or "none"
    choices = {default: f"Automatic: {automatic}"}
    choices |= {name: name for name in reference_label_fields(ctx.dataset)}
    label = "Boxes or masks that mark the concept"
    forms.dropdown(inputs, "reference_label_field", choices, default, label)


def _induction(ctx: Any) -> Any:
    """Create an `InductionJob` from the form's values.

    Raises:
        ValueError: If the saved view does not exist.
    """
    from conceptseg_hf.integrations.fiftyone import InductionJob
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO

    get = ctx.params.get
    view = get("negatives")
    negatives = []
    if view not in (None, "none"):
        if view not in ctx.dataset.list_saved_views():
            raise ValueError(f"saved view {view!r} is not in the dataset; use one of its saved views.")
        negatives = ctx.dataset.load_saved_view(view).values("id")
    return InductionJob(
        prompt=get("prompt") or "",
        reference_ids=get("reference_ids") or list(ctx.selected),
        name=(get("name") or "").strip() or None,
        reference_label_field=get("reference_label_field") or AUTO,
        negative_ids=negatives,
        checkpoint=get("checkpoint") or "nano",
        num_samples=get("num_samples") or 1,
        refine=bool(get("refine")),
        replace=bool(get("replace")),
    )


def _edit(ctx: Any, name: str) -> Any:
    """Create a `ConceptEdit` from the form's values."""
    from conceptseg_hf.integrations.fiftyone import ConceptEdit
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO

    get = ctx.params.get
    phrases = _value(ctx, "phrases", name)
    if isinstance(phrases, str):
        phrases = [phrase.strip() for phrase in phrases.split(PHRASE_SEPARATOR) if phrase.strip()]
    return ConceptEdit(
        name=name,
        rule=_value(ctx, "rule", name),
        phrases=phrases,
        reference_ids=list(ctx.selected) if get("use_selected") else get("reference_ids") or (),
        reference_label_field=get("reference_label_field") or AUTO,
        checkpoint=_value(ctx, "checkpoint", name) or None,
    )


def _job(ctx: Any, name: str) -> Any:
    """Create the `SegmentationJob` of a concept from the form's values.

    Raises:
        ValueError: If the library has no such concept, or the concept is damaged.
    """
    from conceptseg_hf.integrations.fiftyone import concept_job

    get = ctx.params.get
    settings = {
        "field": _value(ctx, "field", name),
        "checkpoint": _value(ctx, "checkpoint", name),
        "router": get("router"),
        "label": (get("label") or "").strip(),
        "batch_size": get("batch_size"),
    }
    settings = {key: value for key, value in settings.items() if value}
    if not get("use_references", True):
        settings["reference_ids"] = []
    return concept_job(
        ctx.dataset,
        name,
        **settings,
        outputs=runs.outputs_of(ctx),
        skip_existing=runs.skip_existing(ctx),
    )


def _keyed(name: str, concept: str) -> str:
    """Return the name of an input whose default depends on the concept: the App keeps the first default of an input."""
    return f"{name}_{zlib.crc32(concept.encode()):08x}"


def _value(ctx: Any, name: str, concept: str) -> Any:
    """Return the value of an input of `_keyed`, or of the parameter `name`, with which Python users call operators."""
    value = ctx.params.get(_keyed(name, concept))
    return ctx.params.get(name) if value is None else value
