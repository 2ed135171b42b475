"""Names and types of the sample fields and of the attributes of predicted labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import fiftyone as fo

OUTPUTS = ("segmentation", "detections", "heatmap")
"""Outputs of a run: a mask file, a box with an instance mask per connected region, and a heatmap: the mask
probabilities, or for CoPRS the positional prior."""

ROUTERS = {
    "adaptive": "Adaptive: SAM 3 first, reason if it is not sure",
    "sam_only": "SAM 3 only: fast, uses the prompt literally",
    "full_reasoning": "Always reason",
}
"""Router modes and their labels in forms."""

CONCEPT_ROUTERS = {
    "adaptive": "Adaptive: the concept, reason if its presence is low",
    "sam_only": "Concept only: fast, never reasons",
    "full_reasoning": "Always reason",
}
"""Router modes and their labels in forms that apply a concept."""

TARGET, REFERENCE = "target", "reference"
"""Values of the field `role`."""

FOREGROUND = 255
"""Pixel value of the concept in mask files."""

PREDICTION_ATTRIBUTES = {
    "concept": fo.StringField,
    "prompt": fo.StringField,
    "rule": fo.StringField,
    "answer": fo.StringField,
    "route": fo.StringField,
    "route_reason": fo.StringField,
    "presence": fo.FloatField,
    "threshold": fo.FloatField,
    "check_iou": fo.FloatField,
    "score": fo.FloatField,
    "decode_presence": fo.FloatField,
    "think": fo.StringField,
    "error": fo.StringField,
    "checkpoint": fo.StringField,
    "router": fo.StringField,
    "run": fo.StringField,
}
"""Attributes of a predicted label, in the order of the App's tooltip. `ConceptSegmentation` documents them, except for
`concept`, the name of the applied concept, and `run`, the key of the custom run that stores the job's settings."""

REGION_ATTRIBUTES = {name: kind for name, kind in PREDICTION_ATTRIBUTES.items() if name != "score"}
"""Attributes of a `Detection`, which has the score as `confidence`; FiftyOne's COCO exporter writes it as `score`."""

BENCHMARK_FIELDS = {
    "role": fo.StringField,
    "level": fo.StringField,
    "group": fo.StringField,
    "family": fo.StringField,
    "prompt": fo.StringField,
    "benchmark": fo.StringField,
    "split": fo.StringField,
    "episode": fo.StringField,
    "present": fo.BooleanField,
    "gt_rule": fo.StringField,
    "gt_answer": fo.StringField,
    "load_error": fo.StringField,
}
"""Fields of a benchmark sample; a target and its own references have the same `episode`."""

REFERENCE_IDS = "reference_ids"
REFERENCE_BOXES = "ref_boxes"
GROUND_TRUTH = "ground_truth"
IGNORE = "ignore"

LABEL_TYPES = {"segmentation": fo.Segmentation, "detections": fo.Detections, "heatmap": fo.Heatmap}


def output_fields(field: str, outputs: Iterable[str]) -> dict[str, str]:
    """Return the sample field of each output: `field` for segmentation, else for detections; suffixed for the others.

    Raises:
        ValueError: If no output is given, an output is unknown, or the name is not a valid field name.
    """
    if not field.isidentifier():
        raise ValueError(f"field name {field!r} is invalid; use letters, digits and underscores.")
    requested = set(outputs)
    unknown = sorted(requested.difference(OUTPUTS))
    if unknown or not requested & {"segmentation", "detections"}:
        raise ValueError(
            f"outputs are {sorted(requested)}; use segmentation, detections or both, and optionally heatmap."
        )
    ordered = [name for name in OUTPUTS if name in requested]
    return {name: field if index == 0 else f"{field}_{name}" for index, name in enumerate(ordered)}


def heatmap_field(samples: fo.core.collections.SampleCollection, field: str) -> str | None:
    """Return the field of the heatmaps of predictions, or None if there is none."""
    name = f"{field}_heatmap"
    return name if name in fields_of_type(samples, fo.Heatmap) else None


def other_route_field(field: str) -> str:
    """Return the field for the predictions of the other route."""
    return f"{field}_other_route"


def check_label_type(schema: Mapping[str, fo.Field], name: str, label_type: type) -> None:
    """Check that a field can hold labels of a type.

    Raises:
        ValueError: If the field exists with another type.
    """
    if name in schema and getattr(schema[name], "document_type", None) is not label_type:
        raise ValueError(
            f"field {name!r} already exists and holds no {label_type.__name__}; use another field name."
        )


def declare_prediction_fields(
    dataset: fo.Dataset, field: str, outputs: Iterable[str] = ("segmentation",)
) -> None:
    """Declare the prediction fields and their attributes, so that the App can show and filter them.

    Repeated calls have no effect.

    Args:
        dataset: Dataset to modify.
        field: Field of the predictions.
        outputs: See `OUTPUTS`.

    Raises:
        ValueError: If a field of that name has another type, or the name is not a valid field name.
    """
    schema = dataset.get_field_schema()
    for output, name in output_fields(field, outputs).items():
        check_label_type(schema, name, LABEL_TYPES[output])
        if name not in schema:
            dataset.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=LABEL_TYPES[output])
        if output == "segmentation":
            dataset.mask_targets = {name: {FOREGROUND: "concept"}} | dataset.mask_targets
        if output != "heatmap":
            _declare(dataset, {f"{name}.{key}": kind for key, kind in PREDICTION_ATTRIBUTES.items()})
        if output == "detections":
            _declare(dataset, {f"{name}.detections.{key}": kind for key, kind in REGION_ATTRIBUTES.items()})
    dataset.save()


def declare_benchmark_fields(dataset: fo.Dataset) -> None:
    """Declare the fields of benchmark samples; repeated calls have no effect."""
    _declare(dataset, BENCHMARK_FIELDS)
    dataset.add_sample_field(REFERENCE_IDS, fo.ListField, subfield=fo.StringField)
    for name in (GROUND_TRUTH, IGNORE):
        dataset.add_sample_field(name, fo.EmbeddedDocumentField, embedded_doc_type=fo.Segmentation)
    dataset.add_sample_field(REFERENCE_BOXES, fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    dataset.mask_targets = dataset.mask_targets | {
        GROUND_TRUTH: {FOREGROUND: "concept"},
        IGNORE: {FOREGROUND: "ignored"},
    }
    dataset.save()


def prediction_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """Return the fields that hold predictions with `PREDICTION_ATTRIBUTES`."""
    schema = samples.get_field_schema(flat=True)
    return [
        name
        for name, field in samples.get_field_schema().items()
        if getattr(field, "document_type", None) in (fo.Segmentation, fo.Detections)
        and f"{name}.route" in schema
        and f"{name}.threshold" in schema
    ]


def fields_of_type(samples: fo.core.collections.SampleCollection, *label_types: type) -> list[str]:
    """Return the fields that hold labels of the given types."""
    return [
        name
        for name, field in samples.get_field_schema().items()
        if getattr(field, "document_type", None) in label_types
    ]


def text_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """Return the string fields that can hold prompts."""
    excluded = {"id", "filepath"}
    return [name for name in samples.get_field_schema(ftype=fo.StringField) if name not in excluded]


def whole_dataset(samples: fo.core.collections.SampleCollection) -> fo.core.collections.SampleCollection:
    """Return the dataset of the samples; for a grouped dataset, a view with the images of all slices."""
    dataset = samples._dataset
    return dataset.select_group_slices(media_type="image") if dataset.media_type == "group" else dataset


def _declare(dataset: fo.Dataset, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        dataset.add_sample_field(name, kind)
