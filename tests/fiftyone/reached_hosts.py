"""Record the hosts that a Python process and its Python children contact, with `audit/sitecustomize.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def audited(environment: Mapping[str, str], file: Path) -> dict[str, str]:
    """Return environment variables that make Python write the contacted hosts to a file."""
    paths = [str(Path(__file__).parent / "audit"), environment.get("PYTHONPATH", "")]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CONCEPTSEG_TEST_HOSTS": str(file),
    }


def hosts_in(file: Path) -> set[str]:
    """Return the hosts recorded so far."""
    return set(file.read_text(encoding="utf-8").splitlines())
