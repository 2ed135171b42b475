"""Helpers for the forms. `conceptseg_hf` must not be imported before `package_missing` was checked."""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

PLUGIN = "@conceptseg/conceptseg"
_MAX_SHOWN_NAMES = 3  # number of file names in one line

INSTALL = (
    "The package conceptseg_hf is not installed in FiftyOne's environment; install it with: "
    "pip install 'conceptseg-hf[fiftyone]'"
)


def config(name: str, label: str, description: str, **options: Any) -> foo.OperatorConfig:
    """Create the configuration of an operator, with the plugin's icons."""
    return foo.OperatorConfig(
        name=name,
        label=label,
        description=description,
        light_icon="/assets/icon-light.svg",
        dark_icon="/assets/icon-dark.svg",
        **options,
    )


def package_missing() -> bool:
    """Whether the package `conceptseg_hf` is not installed."""
    return importlib.util.find_spec("conceptseg_hf") is None


def sentence(message: str) -> str:
    """Capitalize an error message for the App."""
    return message[:1].upper() + message[1:]


def warn(inputs: types.Object, name: str, message: str, blocks: bool = True) -> None:
    """Add a warning to the form; with `blocks`, the form cannot be submitted."""
    message = sentence(message)
    warning = inputs.view(name, types.Warning(label=message))
    if blocks:
        warning.invalid = True
        warning.error_message = message


def dropdown(
    inputs: types.Object,
    name: str,
    choices: Mapping[str, str] | Mapping[int, str],
    default: str | None,
    label: str,
    **options: Any,
) -> None:
    """Add a dropdown of values and their labels."""
    view = types.DropdownView(label=label, **options)
    for value, text in choices.items():
        view.add_choice(value, label=text)
    inputs.enum(name, list(choices), default=default, view=view)


def checkpoint(inputs: types.Object) -> None:
    """Add a text field for the checkpoint."""
    inputs.str(
        "checkpoint",
        default="nano",
        label="Checkpoint",
        description="nano or mini (embedded), a folder, or a hub id",
    )


def target_view(ctx: Any) -> fo.core.collections.SampleCollection:
    """Return the samples that an operator processes as a flat view; `ctx.target_view` cannot flatten dynamic groups."""
    target = ctx.params.get("view_target") or ctx.request_params.get("view_target")
    if ctx.view is not None and ctx.view._is_dynamic_groups and target != "DATASET" and not ctx.selected:
        ctx.target_view()  # keeps the selected target in the form
        return ctx.view.flatten()
    return ctx.target_view(require_flat=True)


def progress(
    ctx: Any, fraction: float, label: str, name: str | None = None, dataset: str | None = None
) -> Iterator[Any]:
    """Show the progress of a run; the caller must yield the messages to the App.

    Args:
        ctx: Execution context.
        fraction: Fraction of the samples that is done, 0 to 1.
        label: Progress message.
        name: Locked name of the run (its field) for the cancel button; None shows no button.
        dataset: Name of the run's dataset; the open dataset by default.

    Yields:
        Messages for the App.
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


def in_background(
    ctx: Any, work: Callable[[Callable[[int, int, str], None]], Any]
) -> Generator[Any, None, Any]:
    """Run a function in a thread and show its progress.

    Args:
        ctx: Execution context.
        work: The function. It is called with a function to report progress: the completed units, their total number,
            and their name.

    Yields:
        Messages for the App.

    Returns:
        The result of the function.
    """
    reports: queue.Queue[tuple[int, int, str] | None] = queue.Queue()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work, lambda *report: reports.put(report))
        future.add_done_callback(lambda _: reports.put(None))
        while (report := reports.get()) is not None:
            done, total, unit = report
            yield from progress(ctx, done / max(total, 1), f"{done} of {total} {unit}")
        return future.result()


def notified(ctx: Any, error: Exception, remark: str = "") -> Iterator[Any]:
    """Show an error in the App and raise it, as the App does not display errors of generators.

    The error replaces the progress in the dialog, which would otherwise look like that of a completed run.
    """
    if not ctx.delegated:
        outputs = types.Object()
        message = f"Failed: {error}"
        outputs.view("failed", types.Error(label=message, description=remark or None))
        yield ctx.ops.show_output(types.Property(outputs).to_json(), {})
        yield ctx.ops.notify(message, variant="error")
    raise error


def named(paths: Iterable[str]) -> str:
    """Return the first few file names, separated by commas."""
    names = [Path(path).name for path in paths]
    return ", ".join(names[:_MAX_SHOWN_NAMES]) + (", ..." if len(names) > _MAX_SHOWN_NAMES else "")


def choose_field(
    inputs: types.Object, name: str, fields: list[str], label: str, missing: str, default: str | None = None
) -> None:
    """Add a dropdown of fields, or a warning if there are none."""
    if not fields:
        warn(inputs, f"{name}_missing", missing)
        return
    dropdown(
        inputs, name, {field: field for field in fields}, default if default in fields else fields[0], label
    )


def table(
    panel: types.Object, name: str, columns: dict[str, str], on_click: Any, tooltip: str
) -> types.TableView:
    """Add a table with clickable rows to a panel and return its view; the rows are the panel's state `name`."""
    view = types.TableView(
        on_click_row=on_click,
        actions_label="Show",
        componentsProps={  # FiftyOne's default table is too wide for half a window
            "table": {"sx": {"minWidth": 0}},
            "tableHeadCell": {"sx": {"px": 1}},
            "tableBodyCell": {"sx": {"px": 1, "fontSize": "1rem"}},
            "tableBodyRow": {"hover": True, "sx": {"cursor": "pointer"}},
        },
    )
    for key, label in columns.items():
        view.add_column(key, label=label)
    view.add_row_action("show", on_click=on_click, icon="visibility", tooltip=tooltip)
    panel.list(name, types.Object(), view=view)
    return view


def form(inputs: types.Object, label: str) -> types.Property:
    """Return the form."""
    return types.Property(inputs, view=types.View(label=label))
