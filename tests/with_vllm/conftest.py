"""Fixtures of the tests that run vLLM; they need an environment of their own: `make test-vllm`."""

from __future__ import annotations

import pytest

from conceptseg_hf.loading import load_model_and_processor

GROUPS = ("same color", "odd one out")


@pytest.fixture(scope="session")
def loaded():
    """The embedded checkpoint and its processor."""
    return load_model_and_processor(None, device="cpu")


@pytest.fixture(scope="session")
def engine(loaded):
    """One engine for all tests; building it takes seconds."""
    from conceptseg_hf.vllm_engine import VllmEngine

    return VllmEngine(*loaded)
