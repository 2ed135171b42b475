"""The browser demo of `conceptseg app`, a Gradio page on the loopback interface.

`page` arranges components and requires Gradio; everything that they call is in the other modules, which do not.
"""

from .examples import EXAMPLE_NAMES, Example, load_example
from .figures import draw_check, draw_layers
from .folders import ImageOutcome, segment_images, write_archive
from .marks import BOX, MASK, mark_reference, parse_box
from .uploads import MAX_BYTES, MAX_PIXELS, UploadError, read_upload

__all__ = [
    "BOX",
    "EXAMPLE_NAMES",
    "MASK",
    "MAX_BYTES",
    "MAX_PIXELS",
    "Example",
    "ImageOutcome",
    "UploadError",
    "draw_check",
    "draw_layers",
    "load_example",
    "mark_reference",
    "parse_box",
    "read_upload",
    "segment_images",
    "write_archive",
]
