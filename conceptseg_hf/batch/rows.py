"""Results as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..boxes import mask_to_box
from ..evaluation.records.rle import encode_mask
from ..outputs import ConceptSegmentation
from ..writing import encode_text
from .items import ImageItem

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


def make_row(item: ImageItem, result: ConceptSegmentation) -> Row:
    """Convert the result of an image to a row; see `schema` for its columns."""
    row: Row = {
        "index": item.index,
        "image": encode_text(item.name).decode(),
        "label": result.label,
        "route": result.route,
        "route_reason": result.route_reason,
        "score": result.score,
        "presence": result.presence,
        "threshold": result.threshold,
        "decode_presence": result.decode_presence,
        "rule": result.rule,
        "answer": result.answer,
        "completion": result.completion,
        "box": None if result.box is None else list(result.box),
        "error": None if result.error is None else encode_text(result.error).decode(),
    }
    if result.mask is not None:
        mask = np.asarray(result.mask) > 0
        box = mask_to_box(mask)
        row |= {
            "width": result.mask.width,
            "height": result.mask.height,
            "mask": encode_mask(mask),
            "mask_area": int(mask.sum()),
            "mask_box": None if box is None else list(box),
        }
    return row


def schema() -> pa.Schema:
    """Return the columns of the results.

    The mask is COCO's compressed run-length encoding at the size of the image. Boxes are (x1, y1, x2, y2) in pixels
    of the image, x2 and y2 exclusive: `box` is the VLM's, `mask_box` encloses the mask. The other columns are fields
    of `ConceptSegmentation`.
    """
    import pyarrow as pa

    text, number, box = pa.string(), pa.float64(), pa.list_(pa.float64())
    return pa.schema(
        {
            "index": pa.int64(),
            "image": text,
            "width": pa.int32(),
            "height": pa.int32(),
            "label": text,
            "route": text,
            "route_reason": text,
            "score": number,
            "presence": number,
            "threshold": number,
            "decode_presence": number,
            "mask": pa.struct({"size": pa.list_(pa.int32()), "counts": text}),
            "mask_area": pa.int64(),
            "mask_box": pa.list_(pa.int32()),
            "box": box,
            "rule": text,
            "answer": text,
            "completion": text,
            "error": text,
        }
    )
