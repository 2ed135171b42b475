"""The page: the layout, and which handler each component calls."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from .browser import scroll_to
from .handlers import Download, Handlers, Updates
from .layout import add_inputs, add_results, add_tabs
from .sessions import Canceled, Demo, Session, status_html

TITLE = "ConceptSeg: segment what a prompt means"

# Names of the components that are passed to each handler of a run, before the session.
_RUNS = {
    "run": ("image", "prompt", "router", "layers"),
    "run_with_rule": ("image", "prompt", "layers", "rule"),
    "compare": ("image", "prompt", "layers"),
    "induce": ("prompt",),
    "apply": ("files", "layers"),
}


def build_page(demo: Demo, note: str = "") -> gr.Blocks:
    """Return the page for a model.

    Args:
        demo: The model.
        note: A remark below the title, as Markdown.
    """
    handlers = Handlers(demo)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{note}")
        with gr.Row():
            with gr.Column(min_width=320):
                add_inputs(demo)
            with gr.Column(min_width=320):
                add_results(demo)
        add_tabs(demo)
        session = gr.State(Session())
        parts = {
            block.elem_id.replace("-", "_"): block
            for block in page.blocks.values()
            if isinstance(block, Component) and block.elem_id is not None
        }
        _connect(parts, session, handlers)
    return page


def _connect(parts: Mapping[str, Any], session: gr.State, handlers: Handlers) -> None:
    """Connect the components to their handlers."""
    outputs = list(parts.values())

    def call(
        trigger: Callable[..., Any], handler: str, *names: str, status: str = "status", **options: Any
    ) -> Any:
        inputs: list[Component] = [*(parts[name] for name in names), session]
        function = reported(getattr(handlers, handler), parts, status)
        return trigger(function, inputs, outputs, api_visibility="private", **options)

    quick: dict[str, Any] = {"show_progress": "hidden"}
    for name in ("cancel", "compare_cancel", "induce_cancel", "apply_cancel"):
        call(parts[name].click, "cancel", queue=False, **quick)
    call(parts["example"].input, "load_example", "example", **quick)
    call(parts["add"].click, "add_reference", "editor", "kind", "box", **quick)
    call(parts["clear"].click, "clear_references", **quick)
    call(parts["layers"].change, "show_layers", "layers", **quick)
    run: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "minimal",
    }
    for trigger, handler in (
        (parts["run"].click, "run"),
        (parts["prompt"].submit, "run"),
        (parts["rerun"].click, "run_with_rule"),
        (parts["rule"].submit, "run_with_rule"),
        (parts["compare"].click, "compare"),
        (parts["induce"].click, "induce"),
        (parts["apply"].click, "apply"),
    ):
        # The tabs show the progress of their runs themselves: the status of the first run can be out of view.
        status = f"{handler}_status" if f"{handler}_status" in parts else "status"
        scroll = scroll_to(parts[status].elem_id, "start" if status == "status" else "center")
        # `start` does not wait in the queue, so that "cancel" also ends runs that are waiting.
        started = call(trigger, "start", queue=False, status=status, js=scroll, **quick)
        call(started.then, handler, *_RUNS[handler], status=status, show_progress_on=[parts[status]], **run)


def reported(
    function: Callable[..., Any], parts: Mapping[str, Any], status: str = "status"
) -> Callable[..., Iterator[dict[Any, Any]]]:
    """Return a generator function for Gradio that reports invalid inputs as a sentence and a canceled run as a status.

    Args:
        function: A handler, which may be a generator.
        parts: The components by name.
        status: Name of the component that shows the status.
    """

    def to_components(updates: Updates) -> dict[Any, Any]:
        values = {
            parts[status if name == "status" else name]: (
                status_html(value) if name == "status" else _value(value)
            )
            for name, value in updates.items()
        }
        return values or {parts[status]: gr.skip()}

    def iterate(*arguments: Any) -> Iterator[dict[Any, Any]]:
        try:
            if inspect.isgeneratorfunction(function):
                for updates in function(*arguments):
                    yield to_components(updates)
            else:
                yield to_components(function(*arguments))
        except Canceled:
            yield {parts[status]: status_html("Canceled.")}
        except (ValueError, OSError) as error:
            sentence = str(error)[:1].upper() + str(error)[1:]
            yield {parts[status]: status_html(f"<strong>Failed:</strong> {html.escape(sentence)}")}
            raise gr.Error(html.escape(sentence), print_exception=False) from error

    return iterate


def _value(value: Any) -> Any:
    if not isinstance(value, Download):
        return value
    return gr.update(
        value=None if value.path is None else str(value.path), interactive=value.path is not None
    )
