"""Errors of checkpoint conversion."""

from __future__ import annotations


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message is one sentence with the checkpoint, the fault and the remedy."""
