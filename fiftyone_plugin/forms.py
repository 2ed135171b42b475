"""What the forms share. Nothing of `conceptseg_hf` is imported before `package_missing` was asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

PLUGIN = "@conceptseg/conceptseg"
_NAMED = 3  # files that a line names

INSTALL = (
    "The package conceptseg_hf is not installed where this FiftyOne runs; install it there with: "
    "pip install 'conceptseg-hf[fiftyone]'"
)


def config(name: str, label: str, description: str, **options: Any) -> foo.OperatorConfig:
    """The configuration of an operator, with the plugin's icons."""
    return foo.OperatorConfig(
        name=name,
        label=label,
        description=description,
        light_icon="/assets/icon-light.svg",
        dark_icon="/assets/icon-dark.svg",
        **options,
    )


def package_missing() -> bool:
    """Whether the package, or what it needs, is absent."""
    return importlib.util.find_spec("conceptseg_hf") is None


def sentence(message: str) -> str:
    """A message of an error as the App shows it."""
    return message[:1].upper() + message[1:]


def warn(inputs: types.Object, name: str, message: str, blocks: bool = True) -> None:
    """A message in the form; with `blocks` the form cannot be sent."""
    message = sentence(message)
    shown = inputs.view(name, types.Warning(label=message))
    if blocks:
        shown.invalid = True
        shown.error_message = message


def dropdown(
    inputs: types.Object,
    name: str,
    choices: Mapping[str, str] | Mapping[int, str],
    default: str | None,
    label: str,
    **options: Any,
) -> None:
    """A dropdown of values and their labels."""
    view = types.DropdownView(label=label, **options)
    for value, text in choices.items():
        view.add_choice(value, label=text)
    inputs.enum(name, list(choices), default=default, view=view)


def target_view(ctx: Any) -> fo.core.collections.SampleCollection:
    """The samples an operator works on, flat. FiftyOne cannot flatten dynamic groups by itself."""
    target = ctx.params.get("view_target") or ctx.request_params.get("view_target")
    if ctx.view is not None and ctx.view._is_dynamic_groups and target != "DATASET" and not ctx.selected:
        ctx.target_view()  # keeps the choice in the form
        return ctx.view.flatten()
    return ctx.target_view(require_flat=True)


def progress(
    ctx: Any, fraction: float, label: str, name: str | None = None, dataset: str | None = None
) -> Iterator[Any]:
    """Shows how far a run is. What it yields has to be yielded to the App.

    Args:
        ctx: The context.
        fraction: Share that is done.
        label: One line.
        name: What the run holds (its field), which a button cancels; None: no button.
        dataset: Name of its dataset; the one that is open by default.
    """
    if ctx.delegated:
        ctx.set_progress(progress=fraction, label=label)
        return
    outputs = types.Object()
    outputs.float("progress", view=types.ProgressView(label=label))
    if name is not None:
        params = {"name": name, "dataset": dataset or ctx.dataset.name}
        button = types.Button(label="Cancel the run", operator=f"{PLUGIN}/cancel_run", params=params)
        outputs.view("cancel", button)
    yield ctx.ops.show_output(types.Property(outputs).to_json(), {"progress": fraction})


def notified(ctx: Any, error: Exception, remark: str = "") -> Iterator[Any]:
    """Shows an error in the App, which keeps those of generators to itself, and raises it.

    It takes the place of the progress, whose dialog would go on looking like that of a run which is done.
    """
    if not ctx.delegated:
        outputs = types.Object()
        message = f"Failed: {error}"
        outputs.view("failed", types.Error(label=message, description=remark or None))
        yield ctx.ops.show_output(types.Property(outputs).to_json(), {})
        yield ctx.ops.notify(message, variant="error")
    raise error


def named(paths: Iterable[str]) -> str:
    """The names of some files in one line, the first of many."""
    names = [Path(path).name for path in paths]
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def choose_field(
    inputs: types.Object, name: str, fields: list[str], label: str, missing: str, default: str | None = None
) -> None:
    """A dropdown of fields, or a warning when there are none."""
    if not fields:
        warn(inputs, f"{name}_missing", missing)
        return
    dropdown(
        inputs, name, {field: field for field in fields}, default if default in fields else fields[0], label
    )


def form(inputs: types.Object, label: str) -> types.Property:
    """The finished form."""
    return types.Property(inputs, view=types.View(label=label))
