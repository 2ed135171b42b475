"""Published weights: the authors' checkpoint and SAM 3 become one folder for Auto classes, and back.

`convert` and `to_original` do what `conceptseg convert` does; `plan_conversion` settles it from names and shapes.
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
