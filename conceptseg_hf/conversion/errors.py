"""What can be wrong with weights that somebody else wrote."""

from __future__ import annotations


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message is one sentence that names it, the fault and the remedy."""
