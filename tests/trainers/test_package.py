"""Tests that the package can be imported without the extra `train`."""

from __future__ import annotations

from pathlib import Path

import conceptseg_trainers
import pytest

TRAINERS = str(Path(conceptseg_trainers.__file__).parents[1])
WITHOUT_EXTRA = """
import sys

sys.path.insert(0, sys.argv[1])
for name in ("trl", "deepspeed", "peft", "datasets"):
    sys.modules[name] = None  # importing it raises ImportError
import conceptseg_trainers
import conceptseg_trainers.from_scratch.loop

print(sorted(set(conceptseg_trainers.__all__) - set(dir(conceptseg_trainers))))
try:
    conceptseg_trainers.MetaGRPOTrainer
except ImportError as error:
    print("ImportError")
"""


def test_extra_is_imported_lazily(fresh_python) -> None:
    assert fresh_python(WITHOUT_EXTRA, TRAINERS).splitlines() == ["[]", "ImportError"]


def test_every_public_name_exists() -> None:
    pytest.importorskip("trl", "1.16")
    for name in conceptseg_trainers.__all__:
        assert getattr(conceptseg_trainers, name).__module__.startswith("conceptseg_trainers.")
    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainer'"):
        conceptseg_trainers.PPOTrainer  # noqa: B018
