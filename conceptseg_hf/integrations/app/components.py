"""Gradio components that read uploads with `read_upload`, before Gradio decodes them."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from PIL import Image

from .uploads import UploadError, read_upload


class _WithoutStub(ComponentMeta):
    """Metaclass of components without events of their own; Gradio's would write a stub file next to this one."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attributes)


class CheckedImage(gr.Image, metaclass=_WithoutStub):
    """An image whose value is a checked RGB image after EXIF rotation."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """Return the image, or None."""
        if payload is None:
            return None
        if payload.path is None:
            raise gr.Error("The image has no file; upload it again.", print_exception=False)
        return _read(payload.path, payload.orig_name)


class CheckedEditor(gr.ImageEditor, metaclass=_WithoutStub):
    """An image editor whose value has a checked RGB background and its layers."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """Return a dictionary with background and layers, or None without a background."""
        if payload is None:
            return None
        parts: Any = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        if parts is None or parts.background is None:
            return None
        layers = [_read(_source(layer), rgb=False) for layer in parts.layers or () if layer is not None]
        return {"background": _read(_source(parts.background)), "layers": layers, "composite": None}


def _source(part: Any) -> Any:
    return part if isinstance(part, bytes) else part.path


def _read(source: Any, name: str | None = None, rgb: bool = True) -> Image.Image:
    try:
        return read_upload(source, None if name is None else repr(name[:80]), rgb)
    except UploadError as error:
        raise gr.Error(str(error), print_exception=False) from error
