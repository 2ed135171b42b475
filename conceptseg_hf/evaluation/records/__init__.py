"""Records: the result of an evaluation for each sample, in memory (`record`) and on disk (`store`)."""

from .record import (
    RECORD_FIELDS,
    RECORD_FORMAT,
    REJECTION_THRESHOLD,
    make_error_record,
    make_record,
    segment_other_routes,
    segment_samples,
    shown_references,
)

__all__ = [
    "RECORD_FIELDS",
    "RECORD_FORMAT",
    "REJECTION_THRESHOLD",
    "make_error_record",
    "make_record",
    "segment_other_routes",
    "segment_samples",
    "shown_references",
]
