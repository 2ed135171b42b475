"""The models' part of the form of FiftyOne's own operator "Apply zoo model", and what its values mean.

That operator itself asks for the samples, the label field, the output directory and the batch size.
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
    """The form. It cannot be sent while something in it cannot work."""
    params = ctx.params.get("remote_params") or {}
    inputs = types.Object()
    fault = _fault_of(ctx, params)
    if fault is not None:
        inputs.view("fault", types.Warning(label=fault), invalid=True, error_message=fault)
    _warn_of_overwriting(inputs, ctx.dataset, ctx.params.get("label_field"))
    _ask_prompt(inputs, ctx, params)
    _ask_references(inputs, ctx.dataset, params)
    _ask_choice(inputs, "router", ROUTERS, "adaptive", "Router")
    _ask_choice(inputs, "output", OUTPUTS, "segmentation", "Output")
    if params.get("output") == "detections":
        inputs.str("label", label="Class of the detections", description="By default: each sample's prompt")
    return types.Property(inputs, required=True)


def zoo_arguments(ctx: Any, params: dict[str, Any]) -> None:
    """Turns the form's values into arguments of `ConceptSegFiftyOneModel`, in place.

    Also prepares the label field. The attributes of the labels to come are declared: the App would not show them else.
    Where existing labels are skipped, those with an error are taken away, so that their samples are tried again.
    """
    arguments = _arguments_of(params)
    params.clear()
    params.update(arguments)
    field = ctx.params["label_field"]
    declare_prediction_fields(ctx.dataset, field, [params.get("output", "segmentation")])
    samples = ctx.target_view()
    if ctx.params.get("skip_existing") and samples.has_field(field):
        samples.match(F(f"{field}.error") != None).clear_sample_field(field)  # noqa: E711 (an expression of FiftyOne)


def _warn_of_overwriting(inputs: types.Object, dataset: fo.Dataset, field: str | None) -> None:
    """The operator proposes every label field of the dataset, so the true masks are easily chosen."""
    if not field or not dataset.has_field(field) or field in prediction_fields(dataset):
        return
    if dataset.count(field):
        message = f"Field {field!r} holds labels that ConceptSeg did not make; the run will replace them."
        inputs.view("overwriting", types.Warning(label=message))


def _ask_prompt(inputs: types.Object, ctx: Any, params: dict[str, Any]) -> None:
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
    default = _ask_field(inputs, "prompt_field", fields, "prompt", "Prompt field")
    samples = ctx.target_view()
    chosen = params.get("prompt_field") or default
    without = samples.exists(chosen, False).count() if chosen in fields else 0
    if without:
        message = f"{without} of {samples.count()} samples have no text in {chosen!r}: they get an error and no mask."
        inputs.view("without_prompt", types.Notice(label=message))


def _ask_references(inputs: types.Object, dataset: fo.Dataset, params: dict[str, Any]) -> None:
    fields = _list_fields(dataset)
    if not fields:
        return
    inputs.bool(
        "own_references",
        default=False,
        label="Each sample's own references",
        description="Show the model other samples with each one: those that a field of it lists by their ids",
        view=types.SwitchView(),
    )
    if params.get("own_references"):
        _ask_field(inputs, "reference_field", fields, REFERENCE_IDS, "Reference field")


def _ask_field(inputs: types.Object, name: str, fields: list[str], likeliest: str, label: str) -> str:
    """Returns the field that is chosen at first."""
    default = likeliest if likeliest in fields else fields[0]
    _ask_choice(inputs, name, dict(zip(fields, fields)), default, label, required=True)
    return default


def _ask_choice(
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
    """What the form's values ask for.

    Values outlive their inputs: those of the tab or switch that was left, and of the form of another model.
    """
    names = set(_ARGUMENTS)
    if "prompt_source" in params:
        names.remove("prompt" if params["prompt_source"] == "field" else "prompt_field")
    if not params.get("own_references", True):
        names.remove("reference_field")
    return {name: value for name, value in params.items() if name in names and value not in (None, "")}


def _fault_of(ctx: Any, params: dict[str, Any]) -> str | None:
    """What cannot work, in one sentence."""
    media = ctx.target_view().media_type
    if media not in (None, "image"):
        return f"These samples are of type {media!r}; choose a dataset or view of images."
    arguments = _arguments_of(params)
    if params.get("prompt_source") == "field":
        if not text_fields(ctx.dataset):
            return "The dataset has no text field; add one that holds a prompt for each sample."
    elif not str(arguments.get("prompt", "")).strip() and "prompt_field" not in arguments:
        return "There is no prompt; give words, or the field that holds them."
    for name in ("prompt_field", "reference_field"):
        if name in arguments and not ctx.dataset.has_field(arguments[name]):
            return f"Field {arguments[name]!r} is not in the dataset; give one of its fields."
    return _label_field_fault(
        ctx.dataset, ctx.params.get("label_field"), arguments.get("output", "segmentation")
    )


def _label_field_fault(dataset: fo.Dataset, name: str | None, output: str) -> str | None:
    if not name:  # FiftyOne's part of the form asks for it
        return None
    try:
        output_fields(name, [output])
    except ValueError as error:
        message = str(error)
        return message[:1].upper() + message[1:]
    field = dataset.get_field(name)
    wanted = LABEL_TYPES[output]
    if field is not None and getattr(field, "document_type", None) is not wanted:
        return f"Field {name!r} is there already and holds no {wanted.__name__}; give another label field."
    return None


def _list_fields(dataset: fo.Dataset) -> list[str]:
    """Fields that can list sample ids."""
    schema = dataset.get_field_schema(ftype=fo.ListField, subfield=fo.StringField)
    return [name for name in schema if name != "tags"]
