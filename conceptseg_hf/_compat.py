"""Compatibility of torchvision's pure-Python parts with a torch build that it was not compiled for.

The torchvision wheels on PyPI are CUDA builds. With a CPU build of torch, their compiled operators cannot be loaded
and importing torchvision fails, because it registers fake kernels for two operators that do not exist. Declaring the
schemas of these operators is enough: the transforms and the fallback of `roi_align`, which SAM 3 uses, are plain
PyTorch.

This file depends only on torch, because `.ci/setup` also installs it without the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from typing import Any

import torch

_OPERATOR_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # keeps the schemas registered


def declare_operators() -> None:
    """Declare missing operators so that torchvision can be imported. Does nothing if its extension loads."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
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


def ensure_torchvision() -> None:
    """Make torchvision importable and its `roi_align` usable without a C++ compiler."""
    declare_operators()
    if importlib.util.find_spec("torchvision") is None:
        return
    has_operators = importlib.import_module("torchvision.extension")._has_ops()
    module: Any = importlib.import_module("torchvision.ops.roi_align")
    fallback: Any = getattr(module, "_roi_align", None)
    if not has_operators and hasattr(fallback, "__wrapped__"):
        # Torchvision compiles its fallback on the first call, which takes seconds and fails without a compiler.
        module._roi_align = fallback.__wrapped__
