"""Parts of the forms and of the execution that all runs share: samples, outputs, progress and resuming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fiftyone.operators as foo
from fiftyone import ViewField as F
from fiftyone.operators import types

from . import forms

DELEGATE_FROM = 500  # number of samples above which the form suggests to schedule the run


def execution_options(ctx: Any) -> foo.ExecutionOptions:
    """Allow immediate and scheduled execution; scheduling is the default for large runs."""
    large = (
        ctx.dataset is not None and not forms.package_missing() and targets_of(ctx).count() > DELEGATE_FROM
    )
    return foo.ExecutionOptions(
        allow_immediate_execution=True, allow_delegated_execution=True, default_choice_to_delegated=large
    )


def execute(ctx: Any, job: Any) -> Iterator[Any]:
    """Run a job; the predictions are saved after each batch.

    Args:
        ctx: Execution context.
        job: A function that returns the `SegmentationJob`; its errors are shown in the App, too.
    """
    from conceptseg_hf.integrations.fiftyone import segment_collection
    from conceptseg_hf.integrations.fiftyone.schema import output_fields

    progress = None
    try:
        job = job()
        for progress in segment_collection(targets_of(ctx), job):
            button = job.field if progress.done < progress.total and not progress.cancelled else None
            yield from forms.progress(ctx, progress.fraction, str(progress), button)
    except Exception as error:
        remark = "" if progress is None else f"{progress}. Predictions are kept; run again to resume."
        yield from forms.notified(ctx, error, remark)
    if ctx.delegated or progress is None:
        return
    yield ctx.ops.reload_dataset()
    yield ctx.ops.set_active_fields(
        [*dict.fromkeys([*ctx.active_fields, *output_fields(job.field, job.outputs).values()])]
    )
    message = str(progress)
    for kind, faults in (("invalid reference", progress.bad_references), ("error", progress.errors)):
        if faults:
            message += f". First {kind}: {next(iter(faults.values()))}"
    if progress.cancelled:
        message += ". Run again with the same settings to resume."
    variant = "success" if message == str(progress) else "warning"
    yield ctx.ops.notify(message, variant=variant)


def targets_of(ctx: Any) -> Any:
    """Return the samples to segment: the target view without the references of a benchmark."""
    samples = forms.target_view(ctx)
    if samples.has_field("role"):
        return samples.match(F("role") != "reference")
    if ctx.dataset.has_field("role"):  # hidden by the view
        return samples.exclude(ctx.dataset.match(F("role") == "reference").values("id"))
    return samples


def outputs_of(ctx: Any) -> list[str]:
    """Return the enabled outputs; by default masks, and with a CoPRS checkpoint also the prior."""
    get, prior = ctx.params.get, has_prior(ctx)
    enabled = {"segmentation": get("segmentation", True), "detections": get("detections", False)}
    enabled["heatmap"] = get("heatmap", prior)
    if prior:
        enabled["heatmap"] = get("prior", enabled["heatmap"])
    return [name for name, value in enabled.items() if value]


def has_prior(ctx: Any) -> bool:
    """Whether the checkpoint of the form is a CoPRS model."""
    from conceptseg_hf.integrations.fiftyone.checkpoints import is_coprs

    return is_coprs(ctx.params.get("checkpoint") or "nano")


def skip_existing(ctx: Any) -> bool | None:
    """Return `SegmentationJob.skip_existing`; after an interrupted run, the form has the input `resume` instead."""
    skip, resume = ctx.params.get("skip_existing"), ctx.params.get("resume")
    if skip or resume is None:
        return skip
    return None if resume else False


def add_output_inputs(
    inputs: types.Object, ctx: Any, job: Any, field: str = "concept", field_input: str = "field"
) -> None:
    """Add the inputs of the outputs.

    Args:
        inputs: Form.
        ctx: Execution context.
        job: The job, or None if the form's values are invalid.
        field: Default of the field for the predictions.
        field_input: Name of its input.
    """
    from conceptseg_hf.integrations.fiftyone.loop import find_interrupted

    inputs.str(field_input, default=field, label="Field for the predictions")
    options = {
        "segmentation": ("Segmentation", "A mask file per sample", True),
        "detections": ("Detections", "A box with an instance mask per connected region", False),
    }
    # Inputs of different names, as the App keeps the first default of an input.
    if has_prior(ctx):
        options["prior"] = ("Heatmap", "A file with the positional prior: where the reasoning points", True)
    else:
        options["heatmap"] = ("Heatmap", "A file with the mask probabilities per sample", False)
    for name, (label, description, default) in options.items():
        inputs.bool(name, default=default, label=label, description=description, view=types.SwitchView())
    inputs.str(
        "label",
        label="Class of the detections and masks",
        description="Default: each detection has the prompt of its sample; the answer is an attribute",
    )
    interrupted = None if job is None else find_interrupted(ctx.dataset, job)
    if interrupted is not None:
        inputs.bool(
            "resume",
            default=True,
            label="Resume the interrupted run",
            description=f"A run with these settings was interrupted; its {interrupted.done} predictions are kept",
            view=types.SwitchView(),
        )
    else:
        inputs.bool(
            "skip_existing",
            label="Skip samples that have a prediction",
            description="Regardless of the run that created it; samples with an error are retried",
            view=types.SwitchView(),
        )
    inputs.int("batch_size", default=8, min=1, label="Batch size")


def add_summary(inputs: types.Object, ctx: Any, job: Any, fault: str | None) -> None:
    """Add a line at the top of the form: the first problem, or the number of samples to segment."""
    from conceptseg_hf.integrations.fiftyone import loop
    from conceptseg_hf.integrations.fiftyone.checkpoints import fault_of, fault_of_concept, fault_of_router
    from conceptseg_hf.integrations.fiftyone.field_locks import InUseError, check_free
    from conceptseg_hf.integrations.fiftyone.runs import writable_fields

    try:
        fault = fault or fault_of(job.checkpoint) or fault_of_router(job.router, job.checkpoint)
        if fault is None and job.concept is not None:
            fault = fault_of_concept(job.concept, job.checkpoint)
        if fault is not None:
            raise ValueError(fault)
        job.check(ctx.dataset)
        targets = targets_of(ctx)
        count = len(loop.pending_ids(targets, job))
        if count == 0:
            raise ValueError(
                "no samples to segment: the view is empty, or all of its samples are done; choose another view."
            )
    except (ValueError, OSError) as error:
        forms.warn(inputs, "fault", str(error))
        return
    try:
        check_free(ctx.dataset, writable_fields(job.field), f"field {job.field!r}")
    except InUseError as error:  # not blocking: a scheduled run may start after the other one has ended
        forms.warn(inputs, "in_use", str(error), blocks=False)
    done = loop.targets_of(targets, job).count() - count
    message = f"{count} samples will be segmented; reference samples are left out."
    if done > 0:
        message = f"{count} samples will be segmented, {done} are done; reference samples are left out."
    if count > DELEGATE_FROM:
        message += " Schedule this large run, so that it continues when the App is closed."
    inputs.view("summary", types.Notice(label=message))
