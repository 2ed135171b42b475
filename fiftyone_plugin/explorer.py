"""Panel `concept_explorer`: metrics, routes, rules and failures of a run, with links to the samples."""

from __future__ import annotations

import textwrap
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone import ViewField as F
from fiftyone.operators import types

from . import forms
from .evaluate import METRIC_COLUMNS, metrics_row

NO_RULE = "(no rule: SAM 3 alone)"
PRIOR = "(no rule: positional prior of CoPRS)"
_MAX_SHOWN_RULES = 50
_RULE_WIDTH = 44  # number of characters that fit next to the sample grid


class ConceptExplorer(foo.Panel):
    """Overview of the predictions of a run."""

    @property
    def config(self) -> foo.PanelConfig:
        """Configuration of the panel."""
        return foo.PanelConfig(
            name="concept_explorer",
            label="Concept explorer",
            help_markdown="Metrics by level and group, routes, rules and failures of ConceptSeg's predictions.",
            light_icon="/assets/icon-light.svg",
            dark_icon="/assets/icon-dark.svg",
        )

    def on_load(self, ctx: Any) -> None:
        """Load the first field and evaluation."""
        self._refresh(ctx)

    def on_change_dataset(self, ctx: Any) -> None:
        """Reset the selection, as another dataset has other fields."""
        ctx.panel.set_state({"field": None, "eval_key": None})
        self._refresh(ctx)

    def on_choose(self, ctx: Any) -> None:
        """Update the panel after another field or run was selected."""
        self._refresh(ctx)

    def show_route(self, ctx: Any) -> None:
        """Show the samples of the clicked bar."""
        field = ctx.panel.get_state("field")
        self._show(ctx, ctx.dataset.match(F(f"{field}.route") == ctx.params.get("x")))

    def show_point(self, ctx: Any) -> None:
        """Show the sample of the clicked point."""
        if ctx.params.get("id"):
            self._show(ctx, ctx.dataset.select([ctx.params["id"]]))

    def show_points(self, ctx: Any) -> None:
        """Show the samples of the selected points."""
        ids = [point["id"] for point in ctx.params.get("data") or () if point.get("id")]
        if ids:
            self._show(ctx, ctx.dataset.select(ids))

    def show_rule(self, ctx: Any) -> None:
        """Show the samples of a row of the rules table."""
        row, field = self._row(ctx, "rules"), ctx.panel.get_state("field")
        if row:
            self._show(ctx, _with_rule(ctx.dataset, field, row["rule"]))

    def show_failure(self, ctx: Any) -> None:
        """Show the samples of a row of the failures table."""
        row = self._row(ctx, "failures")
        if row:
            failures = _failures(ctx.dataset, ctx.panel.get_state("field"), ctx.panel.get_state("eval_key"))
            self._show(ctx, ctx.dataset.select(failures[row["kind"]]))

    def show_group(self, ctx: Any) -> None:
        """Show the samples of a row of the metrics table."""
        row = self._row(ctx, "metrics")
        if row:
            view = ctx.dataset.exists(f"{ctx.panel.get_state('eval_key')}_iou")
            for name in ("level", "group"):
                if row[name] != "all" and isinstance(ctx.dataset.get_field(name), fo.StringField):
                    view = _with_value(view, name, row[name])
            self._show(ctx, view)

    def show_heatmaps(self, ctx: Any) -> None:
        """Show the samples with a heatmap, and the heatmaps on them."""
        from conceptseg_hf.integrations.fiftyone.schema import heatmap_field

        name = heatmap_field(ctx.dataset, ctx.panel.get_state("field"))
        if name is not None:
            self._show(ctx, ctx.dataset.exists(name))
            ctx.ops.set_active_fields([*dict.fromkeys([*ctx.active_fields, name])])

    def show_all(self, ctx: Any) -> None:
        """Show all samples."""
        ctx.ops.clear_view()

    def render(self, ctx: Any) -> types.Property:
        """Render the panel from its state; show a loading view before `on_load` has finished."""
        panel = types.Object()
        state = ctx.panel.get_state
        if not state("status"):
            panel.view("loading", types.LoadingView(label="Reading predictions"))
            return types.Property(panel)
        if state("status") != "ready":
            panel.md(state("status"), name="status_shown")
            return types.Property(panel)
        panel.md(state("summary"), name="summary_shown")
        self._render_choices(panel, ctx)
        if state("metrics"):
            title = "Metrics by level and group"
            self._table(panel, ctx, "metrics", title, METRIC_COLUMNS, self.show_group)
        self._render_plots(panel, ctx)
        columns = {"shown": "Rule", "samples": "n"}
        title = "Rules and the samples they produced"
        if state("rule_count") > _MAX_SHOWN_RULES:
            title += f" (the {_MAX_SHOWN_RULES} most frequent of {state('rule_count')})"
        self._table(panel, ctx, "rules", title, columns, self.show_rule)
        if state("failures"):
            columns, title = {"kind": "Kind", "samples": "n"}, "Failures and skipped samples"
            self._table(panel, ctx, "failures", title, columns, self.show_failure)
        return types.Property(panel, view=types.ObjectView())

    def _refresh(self, ctx: Any) -> None:
        """Update the panel's state from the dataset."""
        if forms.package_missing():
            ctx.panel.set_state("status", forms.INSTALL)
            return
        from conceptseg_hf.integrations.fiftyone.evaluation import BACKEND
        from conceptseg_hf.integrations.fiftyone.schema import heatmap_field, prediction_fields

        ctx.dataset.reload()
        fields = prediction_fields(ctx.dataset)
        if not fields:
            ctx.panel.set_state(
                "status",
                "The dataset has no predictions. Run **ConceptSeg: segment a concept**, then open this panel.",
            )
            return
        field = ctx.panel.get_state("field")
        field = field if field in fields else fields[0]
        keys = [
            key
            for key in ctx.dataset.list_evaluations(method=BACKEND)
            if ctx.dataset.get_evaluation_info(key).config.pred_field == field
        ]
        key = ctx.panel.get_state("eval_key")
        key = key if key in keys else next(iter(keys), None)
        summary, metrics = _evaluation(ctx.dataset, key)
        rules = sorted(_rules(ctx.dataset, field).items(), key=lambda item: -item[1])
        failures = {kind: len(ids) for kind, ids in _failures(ctx.dataset, field, key).items() if ids}
        ctx.panel.set_state(
            {
                "status": "ready",
                "field": field,
                "fields": fields,
                "eval_key": key or "",
                "eval_keys": keys,
                "summary": summary,
                "metrics": metrics,
                "has_presence": ctx.dataset.exists(f"{field}.presence").count() > 0,
                "has_heatmaps": heatmap_field(ctx.dataset, field) is not None,
                "rule_count": len(rules),
                "rules": [
                    {
                        "rule": rule,
                        "shown": textwrap.shorten(rule, _RULE_WIDTH, placeholder=" …"),
                        "samples": count,
                    }
                    for rule, count in rules[:_MAX_SHOWN_RULES]
                ],
                "failures": [{"kind": kind, "samples": count} for kind, count in failures.items()],
            }
        )
        ctx.panel.set_data(
            {"routes": _routes_plot(ctx.dataset, field), "presence": _presence_plot(ctx.dataset, field)}
        )

    def _render_choices(self, panel: types.Object, ctx: Any) -> None:
        for name, values, label in (
            ("field", ctx.panel.get_state("fields"), "Predictions"),
            ("eval_key", ctx.panel.get_state("eval_keys"), "Evaluation"),
        ):
            if values:
                view = types.DropdownView(label=label)
                for value in values:
                    view.add_choice(value, label=value)
                panel.enum(
                    name, values, view=view, on_change=self.on_choose, default=ctx.panel.get_state(name)
                )
        row = panel.h_stack("buttons", gap=2)
        row.btn("refresh", label="Refresh", on_click=self.on_choose)
        row.btn("all", label="Show all samples", on_click=self.show_all)
        if ctx.panel.get_state("has_heatmaps"):
            row.btn("heatmaps", label="Show heatmaps", on_click=self.show_heatmaps)

    def _render_plots(self, panel: types.Object, ctx: Any) -> None:
        common = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "height": 280}
        common |= {"margin": {"l": 50, "r": 20, "t": 40, "b": 45}, "showlegend": False, "dragmode": "select"}
        panel.plot(
            "routes",
            layout=common
            | {"title": {"text": "Routes", "font": {"size": 14}}, "yaxis": {"title": {"text": "samples"}}},
            config={"displayModeBar": False},
            on_click=self.show_route,
        )
        if not ctx.panel.get_state("has_presence"):  # SAM 3 alone was never asked
            return
        panel.plot(
            "presence",
            layout=common
            | {
                "title": {
                    "text": "Presence against threshold (SAM 3 alone above the line)",
                    "font": {"size": 14},
                },
                "xaxis": {"title": {"text": "threshold"}, "range": [-0.03, 1.03]},
                "yaxis": {"title": {"text": "presence"}, "range": [-0.03, 1.03]},
            },
            config={"displayModeBar": False},
            on_click=self.show_point,
            on_selected=self.show_points,
        )

    def _table(
        self, panel: types.Object, ctx: Any, name: str, title: str, columns: dict[str, str], on_click: Any
    ) -> None:
        panel.md(f"**{title}**", name=f"{name}_title")
        table = forms.table(panel, name, columns, on_click, "Show these samples")
        for index, row in enumerate(ctx.panel.get_state(name) or ()):
            if row.get("rule") != row.get("shown"):  # the rule was shortened
                table.add_tooltip(index, 0, row["rule"])

    def _row(self, ctx: Any, name: str) -> dict[str, Any] | None:
        """Return the clicked row, or None for the table header."""
        rows, index = ctx.panel.get_state(name) or [], int(ctx.params["row"])
        return rows[index] if 0 <= index < len(rows) else None

    def _show(self, ctx: Any, view: fo.DatasetView) -> None:
        ctx.ops.set_view(view=view)


def _evaluation(dataset: fo.Dataset, key: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the summary of a run and the rows of its metrics table, or an error message and no rows."""
    from conceptseg_hf.integrations.fiftyone.evaluation import left_out_of, replaced_since, report_of

    if key is None:
        return "This field has no evaluation. Run **ConceptSeg: evaluate masks**.", []
    try:
        report, replaced = report_of(dataset, key), len(replaced_since(dataset, key))
    except ValueError as error:
        return f"**{forms.sentence(str(error))}**", []
    notice = f" **Masks replaced after the evaluation: {replaced}; evaluate again.**" if replaced else ""
    left_out = [f"{len(ids)} {reason}" for reason, ids in left_out_of(dataset, key).items()]
    scored = f" ({len(report.records)} of {dataset.count()} samples" + "".join(
        f"; {text}" for text in left_out
    )
    return f"{report.summary()}{scored}).{notice}", [metrics_row(row) for row in report.table]


def _with_value(view: fo.DatasetView, field: str, value: str) -> fo.DatasetView:
    """Return the samples of a row of the metrics table; "?" stands for samples without a value."""
    if value == "?":
        return view.match((F(field) == None) | F(field).is_in(["", "?"]))  # noqa: E711 (FiftyOne expression)
    return view.match(F(field) == value)


def _answered(dataset: fo.Dataset, field: str) -> fo.DatasetView:
    """Return the samples with a route; this excludes samples with an error, which have no rule, too."""
    return dataset.match(F(f"{field}.route") != None)  # noqa: E711 (FiftyOne expression)


def _with_prior(view: fo.core.collections.SampleCollection, field: str) -> fo.DatasetView:
    """Return the samples with predictions of CoPRS, which writes neither rule nor answer."""
    from conceptseg_hf.coprs.inference import ROUTE_REASONS

    return view.match(F(f"{field}.route_reason").is_in(list(ROUTE_REASONS)))


def _without_prior(view: fo.core.collections.SampleCollection, field: str) -> fo.DatasetView:
    from conceptseg_hf.coprs.inference import ROUTE_REASONS

    return view.match(~F(f"{field}.route_reason").is_in(list(ROUTE_REASONS)))


def _rules(dataset: fo.Dataset, field: str) -> dict[str, int]:
    """Return the number of samples of each rule, and of those without a rule by the reason."""
    answered = _answered(dataset, field)
    rules = _without_prior(answered, field).count_values(f"{field}.rule")
    counts = {rule or NO_RULE: count for rule, count in rules.items()}
    prior = _with_prior(answered, field).count()
    return counts | ({PRIOR: prior} if prior else {})


def _with_rule(dataset: fo.Dataset, field: str, rule: str) -> fo.DatasetView:
    """Return the samples of a row of the rules table."""
    answered = _answered(dataset, field)
    if rule == PRIOR:
        return _with_prior(answered, field)
    value = None if rule == NO_RULE else rule
    return _without_prior(answered, field).match(F(f"{field}.rule") == value)


def _failures(dataset: fo.Dataset, field: str, eval_key: str | None) -> dict[str, list[str]]:
    """Return sample ids by kind of failure; with the key of an evaluation, also the samples that it skipped."""
    from conceptseg_hf.coprs.inference import NO_POSITION
    from conceptseg_hf.integrations.fiftyone.evaluation import left_out_of

    predicted = dataset.exists(field)
    reasoned = _without_prior(predicted.match(F(f"{field}.route") == "reasoning"), field)
    kinds = {
        "error": predicted.match(F(f"{field}.error") != None),  # noqa: E711 (FiftyOne expression)
        "no rule in the completion": reasoned.match(F(f"{field}.rule") == None),  # noqa: E711
        "no answer in the completion": reasoned.match(F(f"{field}.answer") == None),  # noqa: E711
        NO_POSITION: predicted.match(F(f"{field}.route_reason") == NO_POSITION),
        "check IoU below 0.5": predicted.exists(f"{field}.check_iou").match(F(f"{field}.check_iou") < 0.5),
        "empty mask": predicted.match((F(f"{field}.score") == 0) & (F(f"{field}.error") == None)),  # noqa: E711
    }
    left_out = left_out_of(dataset, eval_key) if eval_key else {}
    return {kind: view.values("id") for kind, view in kinds.items()} | {
        f"not evaluated: {reason}": ids for reason, ids in left_out.items()
    }


def _routes_plot(dataset: fo.Dataset, field: str) -> list[dict[str, Any]]:
    counts = dataset.exists(field).count_values(f"{field}.route")
    names = sorted(filter(None, counts), key=lambda name: (name == "reasoning", name))
    return [{"type": "bar", "name": "routes", "x": names, "y": [counts[name] for name in names]}]


def _presence_plot(dataset: fo.Dataset, field: str) -> list[dict[str, Any]]:
    with_presence = dataset.exists(f"{field}.presence")
    paths = ["id", f"{field}.threshold", f"{field}.presence", f"{field}.prompt"]
    ids, thresholds, presences, prompts = with_presence.values(paths)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "samples",
            "x": thresholds,
            "y": presences,
            "ids": ids,
            "text": prompts,
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "threshold",
            "x": [0, 1],
            "y": [0, 1],
            "hoverinfo": "skip",
        },
    ]
