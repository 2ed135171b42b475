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
from fiftyone import ViewField as F

from .schema import LABEL_TYPES, check_label_type, other_route_field, output_fields, whole_dataset

METHOD = "segment_concept"


def keep_run(dataset: fo.Dataset, field: str, settings: Mapping[str, Any]) -> str:
    """Keeps the settings of a run into a field as a custom run of the dataset (`dataset.get_run_info`).

    Returns:
        The run's key. Equal settings have the same key, so a run that is resumed is one run.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    key = f"{field}_{digest[:8]}"
    if key not in dataset.list_runs():
        config = dataset.init_run(**settings)
        config.method = METHOD
        dataset.register_run(key, config)
    return key


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
