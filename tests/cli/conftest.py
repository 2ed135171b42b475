"""Shared by the tests of the command."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(model, processor, tmp_path_factory) -> str:
    """The folder of a random model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
