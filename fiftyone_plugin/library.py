"""Operator `manage_concepts` and panel `concept_library`."""

from __future__ import annotations

import textwrap
from typing import Any

import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms
from .concepts import choose_concept, named_concept, rerun_params

ACTIONS = {"rename": "Rename", "delete": "Delete", "export": "Export a file", "import": "Import a file"}
_DETAILS = {
    "prompt": "Prompt",
    "rule": "Rule",
    "phrases": "Phrases",
    "threshold": "Presence from which it is accepted",
}
_PATH = "Path of a .safetensors file on the machine of the App's server"
_PHRASES_WIDTH = 44  # number of characters that fit next to the sample grid


class ManageConcepts(foo.Operator):
    """Renames, deletes, exports or imports concepts of the library."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "manage_concepts",
            "ConceptSeg: manage concepts",
            "Renames, deletes, exports or imports concepts that are stored with the dataset",
            dynamic=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Manage concepts"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        tabs = types.TabsView()
        for action, text in ACTIONS.items():
            tabs.add_choice(action, label=text)
        action = _action(ctx)
        inputs.enum("action", list(ACTIONS), default=action, view=tabs)
        if action == "import":
            inputs.str(
                "path",
                label="File",
                description=_PATH,
            )
            inputs.str(
                "new_name",
                label="Name in the concept library",
                description="Default: the prompt of the concept",
            )
            inputs.str("checkpoint", default="nano", label="Checkpoint that the concept was made with")
        elif choose_concept(inputs, ctx) is not None:
            if action == "rename":
                inputs.str("new_name", label="New name")
            elif action == "export":
                inputs.str("path", label="File", description=_PATH)
        fault = _fault_of(ctx)
        if fault is not None:
            forms.warn(inputs, "fault", fault)
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> dict[str, str]:
        """Change the library; return a sentence about it."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations import fiftyone as integration

        get, dataset, action = ctx.params.get, ctx.dataset, _action(ctx)
        name = "" if action == "import" else named_concept(ctx)
        new_name, path = _text(ctx, "new_name"), _text(ctx, "path")
        if action == "rename":
            integration.rename_concept(dataset, name, new_name)
            message = f"The concept {name!r} is now called {new_name!r}."
        elif action == "delete":
            integration.delete_concept(dataset, name)
            message = f"The concept {name!r} was deleted; its predictions are kept."
        elif action == "export":
            file = integration.export_concept(dataset, name, path)
            message = f"The concept {name!r} was written to {file}."
        else:
            stored = integration.import_concept(dataset, path, new_name or None, get("checkpoint") or "nano")
            message = f"The concept {stored.name!r} was imported."
        if not ctx.delegated:
            ctx.ops.notify(message, variant="success")
        return {"message": message}

    def resolve_output(self, ctx: Any) -> types.Property:
        """Show the sentence."""
        outputs = types.Object()
        outputs.str("message", label="Concept library", view=types.LabelValueView(read_only=True))
        return types.Property(outputs)


class ConceptLibrary(foo.Panel):
    """The concepts that are stored with the dataset."""

    @property
    def config(self) -> foo.PanelConfig:
        """Configuration of the panel."""
        return foo.PanelConfig(
            name="concept_library",
            label="Concept library",
            help_markdown="Concepts that are stored with the dataset: how well they explain their references, editing, "
            "applying, and files.",
            light_icon="/assets/icon-light.svg",
            dark_icon="/assets/icon-dark.svg",
        )

    def on_load(self, ctx: Any) -> None:
        """List the concepts."""
        self.refresh(ctx)

    def on_change_dataset(self, ctx: Any) -> None:
        """Reset the selection, as another dataset has other concepts."""
        ctx.panel.set_state("name", None)
        self.refresh(ctx)

    def show_concept(self, ctx: Any) -> None:
        """Show the concept of the clicked row."""
        rows, index = ctx.panel.get_state("concepts") or [], int(ctx.params["row"])
        if 0 <= index < len(rows):  # not the header
            ctx.panel.set_state("name", rows[index]["name"])
            self.refresh(ctx)

    def show_reference(self, ctx: Any) -> None:
        """Show the reference of the clicked row."""
        rows, index = ctx.panel.get_state("references") or [], int(ctx.params["row"])
        if 0 <= index < len(rows):
            ctx.ops.set_view(view=ctx.dataset.select([rows[index]["id"]]))

    def show_references(self, ctx: Any) -> None:
        """Show all references of the concept."""
        ids = [row["id"] for row in ctx.panel.get_state("references") or []]
        if ids:
            ctx.ops.set_view(view=ctx.dataset.select(ids, ordered=True))

    def apply(self, ctx: Any) -> None:
        """Open the form that applies the concept, with the settings of its last run."""
        name = self._name(ctx)
        self._prompt(ctx, "apply_concept", rerun_params(ctx, name) if name else {})

    def edit(self, ctx: Any) -> None:
        """Open the form that edits the concept."""
        name = self._name(ctx)
        self._prompt(ctx, "edit_concept", {"concept": name} if name else {})

    def manage(self, ctx: Any) -> None:
        """Open the form that renames, deletes, exports or imports concepts."""
        name = self._name(ctx)
        self._prompt(ctx, "manage_concepts", {"concept": name} if name else {"action": "import"})

    def induce(self, ctx: Any) -> None:
        """Open the form that induces a concept."""
        self._prompt(ctx, "induce_concept", {})

    def render(self, ctx: Any) -> types.Property:
        """Render the panel from its state; show a loading view before `on_load` has finished."""
        panel, state = types.Object(), ctx.panel.get_state
        if not state("status"):
            panel.view("loading", types.LoadingView(label="Reading the concept library"))
            return types.Property(panel)
        panel.md(state("status"), name="status_shown")
        if state("status") == forms.INSTALL:
            return types.Property(panel)
        row = panel.h_stack("buttons", gap=2)
        row.btn("induce", label="Induce a concept", on_click=self.induce)
        row.btn("manage", label="Manage and import", on_click=self.manage)
        row.btn("refresh", label="Refresh", on_click=self.refresh)
        if state("concepts"):
            forms.table(
                panel,
                "concepts",
                {"name": "Name", "phrases": "Phrases", "score": "Mean IoU"},
                self.show_concept,
                "Show this concept",
            )
        if state("name"):
            self._render_concept(panel, state)
        return types.Property(panel, view=types.ObjectView())

    def refresh(self, ctx: Any) -> None:
        """Update the panel's state from the dataset."""
        if forms.package_missing():
            ctx.panel.set_state("status", forms.INSTALL)
            return
        from conceptseg_hf.integrations.fiftyone import concept_names, load_concept

        names = concept_names(ctx.dataset)
        status = f"**Concepts stored with the dataset: {len(names)}**"
        if not names:
            status = "The dataset has no concepts. Select samples with masks or boxes, then induce a concept."
        rows = []
        for name in names:
            try:
                concept = load_concept(ctx.dataset, name).concept
            except ValueError as error:
                rows.append({"name": name, "phrases": str(error), "score": "-"})
                continue
            phrases = textwrap.shorten(" | ".join(concept.phrases), _PHRASES_WIDTH, placeholder=" …")
            score = "-" if concept.score is None else f"{concept.score:.2f}"
            rows.append({"name": name, "phrases": phrases, "score": score})
        shown = self._name(ctx)
        state: dict[str, Any] = {"status": status, "concepts": rows, "name": shown}
        ctx.panel.set_state(state | ({} if shown is None else _details(ctx, shown)))

    def _render_concept(self, panel: types.Object, state: Any) -> None:
        # Texts of concepts may come from files of others; Markdown could load images from other servers.
        panel.view("summary_shown", types.Notice(label=state("summary")))
        for key, label in _DETAILS.items():
            panel.str(key, label=label, view=types.LabelValueView(read_only=True))
        row = panel.h_stack("concept_buttons", gap=2)
        row.btn("apply", label="Apply", on_click=self.apply)
        row.btn("edit", label="Edit and verify", on_click=self.edit)
        if state("references"):
            row.btn("references_button", label="Show the references", on_click=self.show_references)
            columns = {"file": "Reference", "iou": "IoU"}
            forms.table(panel, "references", columns, self.show_reference, "Show this sample")

    def _name(self, ctx: Any) -> str | None:
        """Return the shown concept; the first one if it was renamed or deleted since, None if there are none."""
        from conceptseg_hf.integrations.fiftyone import concept_names

        names, name = concept_names(ctx.dataset), ctx.panel.get_state("name")
        return name if name in names else next(iter(names), None)

    def _prompt(self, ctx: Any, operator: str, params: dict[str, Any]) -> None:
        ctx.prompt(f"{forms.PLUGIN}/{operator}", params=params, on_success=self.refresh)


def _details(ctx: Any, name: str) -> dict[str, Any]:
    """Return the part of the panel's state that describes a concept."""
    from conceptseg_hf.integrations.fiftyone.concept_library import load_concept
    from conceptseg_hf.integrations.fiftyone.concepts import reference_scores, summary_of

    try:
        stored = load_concept(ctx.dataset, name)
    except ValueError as error:
        details: dict[str, Any] = dict.fromkeys(_DETAILS, "-")
        return details | {"summary": forms.sentence(str(error)), "references": []}
    concept, rows = stored.concept, reference_scores(ctx.dataset, stored)
    return {
        "summary": f"{name}: {summary_of(ctx.dataset, stored)}",
        "prompt": concept.prompt,
        "rule": concept.rule or "-",
        "phrases": " | ".join(concept.phrases) or "-",
        "threshold": f"{concept.threshold:.2f}",
        "references": [row | {"iou": f"{row['iou']:.2f}"} for row in rows],
    }


def _text(ctx: Any, name: str) -> str:
    return (ctx.params.get(name) or "").strip()


def _action(ctx: Any) -> str:
    chosen = ctx.params.get("action")
    return chosen if chosen in ACTIONS else "rename"


def _fault_of(ctx: Any) -> str | None:
    """Return why the action is not possible, or None; inputs that are not filled in yet are not faults."""
    from conceptseg_hf.integrations.fiftyone.concept_library import (
        check_export_path,
        check_import,
        check_name,
    )

    get, action = ctx.params.get, _action(ctx)
    path, new_name = _text(ctx, "path"), _text(ctx, "new_name")
    if action in ("export", "import") and not path:
        return "file is empty; enter a path that ends in .safetensors."
    try:
        if action == "rename":
            check_name(ctx.dataset, new_name)
        elif action == "export":
            check_export_path(path)
        elif action == "import":
            check_import(ctx.dataset, path, new_name or None, get("checkpoint") or "nano")
    except (ValueError, OSError) as error:
        return str(error)
    return None
