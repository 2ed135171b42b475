"""Fixtures for the tests of the CLI."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(model, processor, tmp_path_factory) -> str:
    """Folder of a checkpoint with a random model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
