"""The error that ends a batch job."""

from __future__ import annotations


class BatchError(ValueError):
    """A job cannot start or continue; the message is one sentence. Finished batches are kept."""
