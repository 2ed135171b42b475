"""Operator `cancel_run`."""

from __future__ import annotations

from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms


class CancelRun(foo.Operator):
    """Cancels an immediate or scheduled run after the current batch."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "cancel_run",
            "ConceptSeg: cancel a run",
            "Stops a run after the current batch; its predictions are kept, and the same run can be resumed",
            dynamic=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form, with a dropdown of the active runs."""
        inputs = types.Object()
        label = "Cancel a run"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        running = _running(_dataset_of(ctx))
        if not running:  # not an error: the run may have ended just before the button was pressed
            forms.warn(inputs, "none", "No run is writing to this dataset.", blocks=False)
            return forms.form(inputs, label)
        choices = {holder.name: f"{holder.name}: {holder}" for holder in running}
        forms.dropdown(inputs, "name", choices, running[0].name, "Run")
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> dict[str, bool]:
        """Request the cancellation; return whether the run exists."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone.field_locks import request_cancel

        dataset = _dataset_of(ctx)
        chosen = ctx.params.get("name") or next((holder.name for holder in _running(dataset)), None)
        cancelled = dataset is not None and chosen is not None and request_cancel(dataset, chosen)
        message = (
            "The run stops after the current batch; its predictions are kept."
            if cancelled
            else "The run has already ended."
        )
        ctx.ops.notify(message, variant="info")
        return {"cancelled": cancelled}


def _dataset_of(ctx: Any) -> fo.Dataset | None:
    """Return the dataset in the parameters of a button, or the open dataset."""
    name = ctx.params.get("dataset")
    return fo.load_dataset(name) if name is not None and fo.dataset_exists(name) else ctx.dataset


def _running(dataset: fo.Dataset | None) -> list[Any]:
    from conceptseg_hf.integrations.fiftyone.field_locks import holders

    return [] if dataset is None else [holder for holder in holders(dataset) if holder.total]
