"""Packages that only batch jobs need."""

from __future__ import annotations

from types import ModuleType


def import_parquet() -> ModuleType:
    """Return `pyarrow.parquet`.

    Raises:
        ImportError: If pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "batch jobs need the package pyarrow; install it with: pip install conceptseg-hf[batch]"
        ) from error
    return pyarrow.parquet
