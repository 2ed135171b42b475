"""Fixtures for datasets on disk; see trees.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trees import AuthorsTree


@pytest.fixture()
def authors_tree(tmp_path) -> AuthorsTree:
    return AuthorsTree(tmp_path / "root")


@pytest.fixture()
def polyp_root(authors_tree) -> Callable[..., Path]:
    """Colon Polyp with 6 training images and a given number of test images."""

    def make(test: int = 3) -> Path:
        for number in range(6):
            authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
        for number in range(test):
            authors_tree.add("test", "Polyp", "Polyp", f"test_{number}")
        return authors_tree.write()

    return make
