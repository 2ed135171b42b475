"""Operator `cancel_run`."""

from __future__ import annotations

from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms


class CancelRun(foo.Operator):
    """Ends a run, immediate or scheduled, after the batch in work."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the operator is shown and run."""
        return forms.config(
            "cancel_run",
            "ConceptSeg: cancel a run",
            "Ends a run that is in work; what it has done stays, and the same run does the rest",
            dynamic=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """The form: which run."""
        inputs = types.Object()
        label = "Cancel a run"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        found = _running(_dataset_of(ctx))
        if not found:  # no fault: a button may be pressed when its run has just ended
            forms.warn(inputs, "none", "No run writes to this dataset now.", blocks=False)
            return forms.form(inputs, label)
        choices = {holder.name: f"{holder.name}: {holder}" for holder in found}
        forms.dropdown(inputs, "name", choices, found[0].name, "Run")
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> dict[str, bool]:
        """Asks the run to end; returns whether there was one."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone.field_locks import request_cancel

        dataset = _dataset_of(ctx)
        chosen = ctx.params.get("name") or next((holder.name for holder in _running(dataset)), None)
        cancelled = dataset is not None and chosen is not None and request_cancel(dataset, chosen)
        message = (
            "The run ends after the batch in work; what it has done stays."
            if cancelled
            else "There is no such run any more."
        )
        ctx.ops.notify(message, variant="info")
        return {"cancelled": cancelled}


def _dataset_of(ctx: Any) -> fo.Dataset | None:
    """The dataset that a button names, or the one that is open."""
    name = ctx.params.get("dataset")
    return fo.load_dataset(name) if name is not None and fo.dataset_exists(name) else ctx.dataset


def _running(dataset: fo.Dataset | None) -> list[Any]:
    from conceptseg_hf.integrations.fiftyone.field_locks import holders

    return [] if dataset is None else [holder for holder in holders(dataset) if holder.total]
