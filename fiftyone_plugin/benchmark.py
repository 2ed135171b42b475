"""Operator `load_concept_benchmark`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from . import forms

# Used if the parameter is missing. None, which an empty input sends, loads all samples.
_DEFAULT_LIMIT = 60


class LoadConceptBenchmark(foo.Operator):
    """Loads a benchmark as a dataset of targets and references."""

    @property
    def config(self) -> foo.OperatorConfig:
        """Configuration of the operator."""
        return forms.config(
            "load_concept_benchmark",
            "ConceptSeg: load a benchmark",
            "ConceptShapes (synthetic, requires no files) or a benchmark of the suite from its files",
            dynamic=True,
            execute_as_generator=True,
            allow_delegated_execution=True,
        )

    def resolve_input(self, ctx: Any) -> types.Property:
        """Build the form."""
        inputs = types.Object()
        label = "Load a benchmark"
        if forms.package_missing():
            forms.warn(inputs, "missing", forms.INSTALL)
            return forms.form(inputs, label)
        from conceptseg_hf.data import BENCHMARKS, SOURCES

        titles = {name: f"{SOURCES[name].title} ({name})" if name in SOURCES else name for name in BENCHMARKS}
        forms.dropdown(inputs, "benchmark", titles, "concept-shapes", "Benchmark")
        name = ctx.params.get("benchmark") or "concept-shapes"
        if name in SOURCES:
            inputs.str("root", label="Folder of the benchmark", required=True)
            if SOURCES[name].note:
                inputs.view("note", types.Notice(label=SOURCES[name].note))
        inputs.str("split", default="test", label="Split")
        inputs.int(
            "limit",
            default=_DEFAULT_LIMIT,
            min=1,
            label="Maximum number of samples",
            description="Leave empty for all samples",
        )
        inputs.str("dataset_name", label="Dataset name", description="By default: benchmark-split")
        fault = _fault_of(ctx)
        if fault is not None:
            forms.warn(inputs, "fault", fault)
        return forms.form(inputs, label)

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Load the benchmark, then open the dataset."""
        if forms.package_missing():
            raise ImportError(forms.INSTALL)
        from conceptseg_hf.integrations.fiftyone.benchmarks import LOADING, import_benchmark
        from conceptseg_hf.integrations.fiftyone.progress import time_left

        get = ctx.params.get
        name, split = get("benchmark") or "concept-shapes", get("split") or "test"
        dataset_name = get("dataset_name") or f"{name}-{split}"
        limit = get("limit", _DEFAULT_LIMIT)
        done, total, started = 0, 0, time.monotonic()
        try:
            for done, total in import_benchmark(name, get("root") or None, split, limit, dataset_name):
                label = ", ".join(
                    filter(None, [f"{done} of {total} samples", time_left(done, total, started)])
                )
                button = LOADING if done < total else None
                yield from forms.progress(ctx, done / max(total, 1), label, button, dataset_name)
        except Exception as error:
            remark = f"{done} of {total} samples were loaded; load again to resume." if done else ""
            yield from forms.notified(ctx, error, remark)
        if ctx.delegated:
            return
        unreadable = []
        if fo.dataset_exists(dataset_name):
            unreadable = fo.load_dataset(dataset_name).exists("load_error").values("filepath")
        message = f"{done} of {total} samples"
        if done < total:
            message = f"Cancelled after {message}; load again to resume"
        if unreadable:
            message += f"; {len(unreadable)} could not be read, see load_error ({forms.named(unreadable)})"
        yield from forms.progress(ctx, done / max(total, 1), message)
        yield ctx.ops.open_dataset(dataset_name)  # last, so that the dialog can be closed afterwards


def _fault_of(ctx: Any) -> str | None:
    """Return why the benchmark cannot be loaded, or None; a benchmark in files is checked once its folder is set."""
    from conceptseg_hf.data import SOURCES, load_benchmark
    from conceptseg_hf.data.registry import open_benchmark

    name, root = ctx.params.get("benchmark"), ctx.params.get("root")
    try:
        if name not in SOURCES:
            load_benchmark(name or "concept-shapes", split=ctx.params.get("split") or "test")
        elif root:
            open_benchmark(name, root, ctx.params.get("split") or "test", ctx.params.get("limit"))
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    return None
