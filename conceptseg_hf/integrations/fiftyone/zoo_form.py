"""Model inputs for the form of FiftyOne's operator "Apply zoo model", and their conversion to arguments.

The operator itself provides the inputs for the samples, the label field, the output directory and the batch size.
"""

from __future__ import annotations

from typing import Any

import fiftyone as fo
from fiftyone import ViewField as F
from fiftyone.operators import types

from .schema import (
    LABEL_TYPES,
    REFERENCE_IDS,
    ROUTERS,
    declare_prediction_fields,
    output_fields,
    prediction_fields,
    text_fields,
)

OUTPUTS = {
    "segmentation": "Segmentation: a mask per sample",
    "detections": "Detections: a box with instance mask per connected region",
}
_ARGUMENTS = ("prompt", "prompt_field", "reference_field", "router", "output", "label")


def zoo_form(ctx: Any) -> types.Property:
    """Return the form, which cannot be submitted while an input is invalid."""
    params = ctx.params.get("remote_params") or {}
    inputs = types.Object()
    fault = _fault_of(ctx, params)
    if fault is not None:
        inputs.view("fault", types.Warning(label=fault), invalid=True, error_message=fault)
    _warn_about_overwriting(inputs, ctx.dataset, ctx.params.get("label_field"))
    _add_prompt_inputs(inputs, ctx, params)
    _add_reference_inputs(inputs, ctx.dataset, params)
    _add_dropdown(inputs, "router", ROUTERS, "adaptive", "Router")
    _add_dropdown(inputs, "output", OUTPUTS, "segmentation", "Output")
    if params.get("output") == "detections":
        inputs.str("label", label="Class of the detections", description="By default: each sample's prompt")
    return types.Property(inputs, required=True)


def zoo_arguments(ctx: Any, params: dict[str, Any]) -> None:
    """Convert the form's values to arguments of `ConceptSegFiftyOneModel`, in place, and prepare the label field.

    The label attributes are declared, as the App would not show them otherwise. If existing labels are skipped, labels
    with an error are cleared, so that their samples are retried.
    """
    arguments = _arguments_of(params)
    params.clear()
    params.update(arguments)
    field = ctx.params["label_field"]
    declare_prediction_fields(ctx.dataset, field, [params.get("output", "segmentation")])
    samples = ctx.target_view()
    if ctx.params.get("skip_existing") and samples.has_field(field):
        samples.match(F(f"{field}.error") != None).clear_sample_field(field)  # noqa: E711 (FiftyOne expression)


def _warn_about_overwriting(inputs: types.Object, dataset: fo.Dataset, field: str | None) -> None:
    """Warn if the label field holds other labels; the operator suggests all label fields, also the ground truth."""
    if not field or not dataset.has_field(field) or field in prediction_fields(dataset):
        return
    if dataset.count(field):
        message = f"Field {field!r} holds labels that ConceptSeg did not create; the run will replace them."
        inputs.view("overwriting", types.Warning(label=message))


def _add_prompt_inputs(inputs: types.Object, ctx: Any, params: dict[str, Any]) -> None:
    tabs = types.TabsView()
    tabs.add_choice("text", label="One prompt for all")
    tabs.add_choice("field", label="Prompts in a field")
    inputs.enum("prompt_source", ["text", "field"], default="text", view=tabs)
    if params.get("prompt_source") != "field":
        inputs.str("prompt", label="Prompt", description='The concept in words, such as "red circle"')
        return
    fields = text_fields(ctx.dataset)
    if not fields:
        return
    default = _add_field_dropdown(inputs, "prompt_field", fields, "prompt", "Prompt field")
    samples = ctx.target_view()
    chosen = params.get("prompt_field") or default
    missing = samples.exists(chosen, False).count() if chosen in fields else 0
    if missing:
        message = (
            f"{missing} of {samples.count()} samples have no prompt in {chosen!r} and will get an error."
        )
        inputs.view("without_prompt", types.Notice(label=message))


def _add_reference_inputs(inputs: types.Object, dataset: fo.Dataset, params: dict[str, Any]) -> None:
    fields = _list_fields(dataset)
    if not fields:
        return
    inputs.bool(
        "own_references",
        default=False,
        label="Each sample's own references",
        description="Use other samples as references: each sample lists their ids in a field",
        view=types.SwitchView(),
    )
    if params.get("own_references"):
        _add_field_dropdown(inputs, "reference_field", fields, REFERENCE_IDS, "Reference field")


def _add_field_dropdown(
    inputs: types.Object, name: str, fields: list[str], preferred: str, label: str
) -> str:
    """Add a dropdown of fields and return its default."""
    default = preferred if preferred in fields else fields[0]
    _add_dropdown(inputs, name, dict(zip(fields, fields)), default, label, required=True)
    return default


def _add_dropdown(
    inputs: types.Object,
    name: str,
    choices: dict[str, str],
    default: str,
    label: str,
    required: bool = False,
) -> None:
    view = types.DropdownView(label=label)
    for value, text in choices.items():
        view.add_choice(value, label=text)
    inputs.enum(name, list(choices), default=default, required=required, view=view)


def _arguments_of(params: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the visible inputs.

    FiftyOne keeps the values of hidden inputs, of the inactive tab and of another model's form.
    """
    names = set(_ARGUMENTS)
    if "prompt_source" in params:
        names.remove("prompt" if params["prompt_source"] == "field" else "prompt_field")
    if not params.get("own_references", True):
        names.remove("reference_field")
    return {name: value for name, value in params.items() if name in names and value not in (None, "")}


def _fault_of(ctx: Any, params: dict[str, Any]) -> str | None:
    """Return the first problem with the form's values as a sentence, or None."""
    media = ctx.target_view().media_type
    if media not in (None, "image"):
        return f"Samples have media type {media!r}; choose a dataset or view of images."
    arguments = _arguments_of(params)
    if params.get("prompt_source") == "field":
        if not text_fields(ctx.dataset):
            return "The dataset has no string field; add one with a prompt for each sample."
    elif not str(arguments.get("prompt", "")).strip() and "prompt_field" not in arguments:
        return "Prompt is empty; enter a prompt, or choose the field that contains the prompts."
    for name in ("prompt_field", "reference_field"):
        if name in arguments and not ctx.dataset.has_field(arguments[name]):
            return f"Field {arguments[name]!r} is not in the dataset; use one of its fields."
    return _label_field_fault(
        ctx.dataset, ctx.params.get("label_field"), arguments.get("output", "segmentation")
    )


def _label_field_fault(dataset: fo.Dataset, name: str | None, output: str) -> str | None:
    if not name:  # required by FiftyOne's part of the form
        return None
    try:
        output_fields(name, [output])
    except ValueError as error:
        message = str(error)
        return message[:1].upper() + message[1:]
    field = dataset.get_field(name)
    label_type = LABEL_TYPES[output]
    if field is not None and getattr(field, "document_type", None) is not label_type:
        return f"Field {name!r} already exists and holds no {label_type.__name__}; use another label field."
    return None


def _list_fields(dataset: fo.Dataset) -> list[str]:
    """Return the fields that can list sample ids."""
    schema = dataset.get_field_schema(ftype=fo.ListField, subfield=fo.StringField)
    return [name for name in schema if name != "tags"]
