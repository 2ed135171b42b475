"""Conversion of the authors' checkpoint and SAM 3 to one folder for Auto classes, and back.

`convert` and `to_original` implement `conceptseg convert`; `plan_conversion` plans a conversion from names and shapes
without reading weights.
"""

from .converter import MANIFEST_NAME, Conversion, convert, plan_conversion, to_original
from .errors import ConversionError
from .plan import Plan, Step

__all__ = [
    "MANIFEST_NAME",
    "Conversion",
    "ConversionError",
    "Plan",
    "Step",
    "convert",
    "plan_conversion",
    "to_original",
]
