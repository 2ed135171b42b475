"""Lets torchvision's pure-Python parts import beside a torch it was not compiled for.

The torchvision wheels of PyPI are CUDA builds. Beside a CPU torch their compiled operators cannot be loaded, and importing torchvision then
fails because two operator schemas, which it registers fake kernels for, do not exist. Declaring the schemas is enough: the transforms and
`roi_align`'s fallback, which SAM 3 uses, are plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import pathlib

import torch

_OPERATOR_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this reference


def ensure_torchvision() -> None:
    """Makes `import torchvision` work; does nothing on a healthy installation. Call it before torchvision is imported."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in pathlib.Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATOR_SCHEMAS:
        _library.define(schema)
