"""Which hosts a Python process and its Python children ask for: `audit/sitecustomize.py` writes each down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def audited(environment: Mapping[str, str], file: Path) -> dict[str, str]:
    """An environment in which Python notes the hosts in a file."""
    paths = [str(Path(__file__).parent / "audit"), environment.get("PYTHONPATH", "")]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CONCEPTSEG_TEST_HOSTS": str(file),
    }


def hosts_in(file: Path) -> set[str]:
    """The hosts noted so far."""
    return set(file.read_text(encoding="utf-8").splitlines())
