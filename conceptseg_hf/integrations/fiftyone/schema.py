"""Names and types of the fields: what a benchmark sample has, and what a prediction carries beside its mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import fiftyone as fo

OUTPUTS = ("segmentation", "detections", "heatmap")
"""What a run can write: a mask on disk, a box with instance mask per connected region, mask probabilities."""

ROUTERS = {
    "adaptive": "Adaptive: SAM 3 first, reason if it is not sure",
    "sam_only": "SAM 3 only: fast, words as they stand",
    "full_reasoning": "Always reason",
}
"""Router modes as forms show them."""

TARGET, REFERENCE = "target", "reference"
"""Values of the field `role`."""

FOREGROUND = 255
"""Value of the concept's pixels in the masks on disk."""

PREDICTION_ATTRIBUTES = {
    "prompt": fo.StringField,
    "rule": fo.StringField,
    "answer": fo.StringField,
    "route": fo.StringField,
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
"""Attributes of a predicted label, in the order of the App's tooltip; `ConceptSegmentation` says what they mean, and
`run` is the key of the custom run that holds the job's settings."""

REGION_ATTRIBUTES = {name: kind for name, kind in PREDICTION_ATTRIBUTES.items() if name != "score"}
"""Those of one `Detection`, whose `confidence` is the score: FiftyOne's COCO exporter writes that as `score` itself."""

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
"""Text and flags of a benchmark sample; `episode` joins a target with the references that are its own."""

REFERENCE_IDS = "reference_ids"
REFERENCE_BOXES = "ref_boxes"
GROUND_TRUTH = "ground_truth"
IGNORE = "ignore"

LABEL_TYPES = {"segmentation": fo.Segmentation, "detections": fo.Detections, "heatmap": fo.Heatmap}


def output_fields(field: str, outputs: Iterable[str]) -> dict[str, str]:
    """The sample field of each output: the first of segmentation and detections is `field`, others have a suffix.

    Raises:
        ValueError: If there is no output, or one that does not exist, or the name cannot be a field's.
    """
    if not field.isidentifier():
        raise ValueError(f"field {field!r} cannot be a field's name; use letters, digits and underscores.")
    wanted = set(outputs)
    unknown = sorted(wanted.difference(OUTPUTS))
    if unknown or not wanted & {"segmentation", "detections"}:
        raise ValueError(
            f"outputs are {sorted(wanted)}; give segmentation, detections or both, and heatmap if you want it."
        )
    ordered = [name for name in OUTPUTS if name in wanted]
    return {name: field if index == 0 else f"{field}_{name}" for index, name in enumerate(ordered)}


def other_route_field(field: str) -> str:
    """Where the predictions of the route that was not taken go."""
    return f"{field}_other_route"


def check_label_type(schema: Mapping[str, fo.Field], name: str, label_type: type) -> None:
    """Finds out whether a field can hold labels of a type.

    Raises:
        ValueError: If it is there and of another type.
    """
    if name in schema and getattr(schema[name], "document_type", None) is not label_type:
        raise ValueError(
            f"field {name!r} is there already and holds no {label_type.__name__}; give another field name."
        )


def declare_prediction_fields(
    dataset: fo.Dataset, field: str, outputs: Iterable[str] = ("segmentation",)
) -> None:
    """Declares the fields of predictions and their attributes, so that the App shows and filters them at once.

    May be called any number of times.

    Args:
        dataset: The dataset.
        field: The field of the predictions.
        outputs: See `OUTPUTS`.

    Raises:
        ValueError: If a field of that name is of another type, or the name cannot be one.
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
    """Declares the fields of benchmark samples; may be called any number of times."""
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
    """The fields that hold predictions with the attributes above."""
    schema = samples.get_field_schema(flat=True)
    return [
        name
        for name, field in samples.get_field_schema().items()
        if getattr(field, "document_type", None) in (fo.Segmentation, fo.Detections)
        and f"{name}.route" in schema
        and f"{name}.threshold" in schema
    ]


def fields_of_type(samples: fo.core.collections.SampleCollection, *label_types: type) -> list[str]:
    """The fields that hold labels of these types."""
    return [
        name
        for name, field in samples.get_field_schema().items()
        if getattr(field, "document_type", None) in label_types
    ]


def text_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """The fields that can hold prompts."""
    hidden = {"id", "filepath"}
    return [name for name in samples.get_field_schema(ftype=fo.StringField) if name not in hidden]


def whole_dataset(samples: fo.core.collections.SampleCollection) -> fo.core.collections.SampleCollection:
    """The dataset that samples come from; of a grouped one the images of all slices, as it shows one slice only."""
    dataset = samples._dataset
    return dataset.select_group_slices(media_type="image") if dataset.media_type == "group" else dataset


def _declare(dataset: fo.Dataset, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        dataset.add_sample_field(name, kind)
