"""Runs that are stored with a dataset, and the fields that they own.

The stored runs determine which fields hold predictions of a run. Names and types are not sufficient, because users may
copy predictions to correct them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import fiftyone as fo
import fiftyone.core.odm as odm
from fiftyone import ViewField as F

from .schema import (
    FOREGROUND,
    LABEL_TYPES,
    check_label_type,
    other_route_field,
    output_fields,
    whole_dataset,
)

METHOD = "segment_concept"


def catch_up(samples: fo.core.collections.SampleCollection) -> None:
    """Reload the dataset if another process has added fields to it, or has added or deleted runs.

    Without such changes the dataset is not reloaded, as existing views become invalid after a reload.

    Raises:
        ValueError: If the dataset was deleted.
    """
    known, datasets = samples._dataset._doc, odm.get_db_conn()["datasets"]
    stored = datasets.find_one({"_id": known.id}, {"sample_fields.name": True, "runs": True})
    if stored is None:
        raise ValueError(f"dataset {samples._dataset.name!r} was deleted; create or load it again.")
    fields = {field["name"] for field in stored["sample_fields"]}
    if fields - {field.name for field in known.sample_fields} or set(stored["runs"]) != set(known.runs):
        samples.reload()


def keep_run(dataset: fo.Dataset, field: str, settings: Mapping[str, Any]) -> str:
    """Store the settings of a run that writes to a field as a custom run (`dataset.get_run_info`).

    Returns:
        The run's key. Equal settings have the same key, so a resumed run counts as the same run.
    """
    key = run_key(field, settings)
    if key not in dataset.list_runs():
        config = dataset.init_run(**settings)
        config.method = METHOD
        dataset.register_run(key, config)
    return key


def run_key(field: str, settings: Mapping[str, Any]) -> str:
    """Return the key of a run that writes to a field with these settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{field}_{digest[:8]}"


def load_run(dataset: fo.Dataset, key: str) -> dict[str, Any]:
    """Load the settings of a run.

    Raises:
        ValueError: If the run does not exist.
    """
    if key not in dataset.list_runs():
        raise ValueError(f"run {key!r} is not stored in the dataset; segment its samples again.")
    return dataset.get_run_info(key).config.serialize()


def stored_settings(dataset: fo.Dataset, method: str) -> dict[str, dict[str, Any]]:
    """Return the settings of all runs of a method by key, as stored in the database, which other processes modify."""
    database = odm.get_db_conn()
    document = database["datasets"].find_one({"_id": dataset._doc.id}, {"runs": True}) or {"runs": {}}
    found = database["runs"].find({"_id": {"$in": list(document["runs"].values())}, "config.method": method})
    return {run["key"]: run["config"] for run in found.sort("_id")}


def written_fields(dataset: fo.Dataset, field: str) -> set[str]:
    """Return all fields written by the runs that write to a field."""
    keys = dataset.list_runs(method=METHOD, field=field)
    return {name for key in keys for name in output_fields(field, load_run(dataset, key)["outputs"]).values()}


def stale_fields(dataset: fo.Dataset, field: str, outputs: Iterable[str]) -> list[str]:
    """Return the fields of earlier runs that a new prediction invalidates: its missing outputs and the other route."""
    old = written_fields(dataset, field) | written_fields(dataset, other_route_field(field))
    return sorted(
        name for name in old.difference(output_fields(field, outputs).values()) if dataset.has_field(name)
    )


def writable_fields(field: str) -> list[str]:
    """Return all fields that a run on `field` may write or clear, starting with `field`."""
    return [field, *(f"{field}_{output}" for output in ("detections", "heatmap")), other_route_field(field)]


def name_masks(dataset: fo.Dataset, field: str) -> None:
    """Set the foreground class of a field in `mask_targets` to the `label` of the runs with predictions in the field.

    If the labels differ, the class is "concept". A class that was not set by a run is left unchanged.
    """
    keys = dataset.list_runs(method=METHOD, field=field)
    labels = {key: load_run(dataset, key).get("label") for key in keys}
    present = whole_dataset(dataset).distinct(f"{field}.run")
    present_labels = {labels[key] for key in present if key in labels}
    label = present_labels.pop() if len(present_labels) == 1 else None
    targets = dataset.mask_targets.get(field, {})
    if label is not None or targets.get(FOREGROUND) in filter(None, labels.values()):
        dataset.mask_targets = dataset.mask_targets | {field: targets | {FOREGROUND: label or "concept"}}
        dataset.save()


def check_output_fields(dataset: fo.Dataset, field: str, outputs: Iterable[str]) -> None:
    """Check that a run overwrites only its own predictions.

    Raises:
        ValueError: If an output field has another type, or holds labels that no run on `field` created.
    """
    schema, samples = dataset.get_field_schema(), whole_dataset(dataset)
    written, keys = written_fields(dataset, field), dataset.list_runs(method=METHOD, field=field)
    for output, name in output_fields(field, outputs).items():
        check_label_type(schema, name, LABEL_TYPES[output])
        if name not in schema:
            continue
        labels = samples.exists(name)
        if name in written:  # heatmaps have no `run` attribute
            labels = labels.match(~F(f"{name}.run").is_in(keys)) if output != "heatmap" else labels.limit(0)
        if labels.count():
            raise ValueError(
                f"field {name!r} holds labels that ConceptSeg did not create there; use another field name."
            )
