"""The runs that a dataset remembers, and the fields that are theirs.

A field belongs to the runs that wrote it, by their records: neither its name nor its type says so, as a curator may
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
    """Learns of fields and runs that other processes have added to the dataset since it was read.

    Nothing is reloaded where there are none: views that were made before a reload of FiftyOne cannot be read after it.

    Raises:
        ValueError: If the dataset is gone.
    """
    known, datasets = samples._dataset._doc, odm.get_db_conn()["datasets"]
    stored = datasets.find_one({"_id": known.id}, {"sample_fields.name": True, "runs": True})
    if stored is None:
        raise ValueError(f"dataset {samples._dataset.name!r} was deleted; load it again.")
    fields = {field["name"] for field in stored["sample_fields"]}
    if fields - {field.name for field in known.sample_fields} or set(stored["runs"]) - set(known.runs):
        samples.reload()


def keep_run(dataset: fo.Dataset, field: str, settings: Mapping[str, Any]) -> str:
    """Keeps the settings of a run into a field as a custom run of the dataset (`dataset.get_run_info`).

    Returns:
        The run's key. Equal settings have the same key, so a run that is resumed is one run.
    """
    key = run_key(field, settings)
    if key not in dataset.list_runs():
        config = dataset.init_run(**settings)
        config.method = METHOD
        dataset.register_run(key, config)
    return key


def run_key(field: str, settings: Mapping[str, Any]) -> str:
    """The key of a run into a field with these settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{field}_{digest[:8]}"


def load_run(dataset: fo.Dataset, key: str) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        ValueError: If there is no such run.
    """
    if key not in dataset.list_runs():
        raise ValueError(f"run {key!r} is not kept in the dataset; segment its samples again.")
    return dataset.get_run_info(key).config.serialize()


def written_fields(dataset: fo.Dataset, field: str) -> set[str]:
    """The fields that runs into a field have written."""
    keys = dataset.list_runs(method=METHOD, field=field)
    return {name for key in keys for name in output_fields(field, load_run(dataset, key)["outputs"]).values()}


def stale_fields(dataset: fo.Dataset, field: str, outputs: Iterable[str]) -> list[str]:
    """The fields of earlier runs that a new prediction makes void: outputs that it lacks, and the other route."""
    old = written_fields(dataset, field) | written_fields(dataset, other_route_field(field))
    return sorted(
        name for name in old.difference(output_fields(field, outputs).values()) if dataset.has_field(name)
    )


def writable_fields(field: str) -> list[str]:
    """All fields that a run into a field may write or clear, itself first."""
    return [field, *(f"{field}_{output}" for output in ("detections", "heatmap")), other_route_field(field)]


def name_masks(dataset: fo.Dataset, field: str) -> None:
    """Gives the masks of a field the class that all runs with predictions in it have named, in `mask_targets`.

    Where they differ it is "concept". A name that no run gave stays.
    """
    keys = dataset.list_runs(method=METHOD, field=field)
    labels = {key: load_run(dataset, key).get("label") for key in keys}
    present = whole_dataset(dataset).distinct(f"{field}.run")
    found = {labels[key] for key in present if key in labels}
    label = found.pop() if len(found) == 1 else None
    targets = dataset.mask_targets.get(field, {})
    if label is not None or targets.get(FOREGROUND) in filter(None, labels.values()):
        dataset.mask_targets = dataset.mask_targets | {field: targets | {FOREGROUND: label or "concept"}}
        dataset.save()


def check_output_fields(dataset: fo.Dataset, field: str, outputs: Iterable[str]) -> None:
    """Finds labels that a run would spoil.

    Raises:
        ValueError: If a field is there and of another type, or holds labels that no run into `field` has made.
    """
    schema, samples = dataset.get_field_schema(), whole_dataset(dataset)
    written, keys = written_fields(dataset, field), dataset.list_runs(method=METHOD, field=field)
    for output, name in output_fields(field, outputs).items():
        check_label_type(schema, name, LABEL_TYPES[output])
        if name not in schema:
            continue
        labels = samples.exists(name)
        if name in written:  # a heatmap does not say which run made it
            labels = labels.match(~F(f"{name}.run").is_in(keys)) if output != "heatmap" else labels.limit(0)
        if labels.count():
            raise ValueError(
                f"field {name!r} holds labels that ConceptSeg did not make there; give another field name."
            )
