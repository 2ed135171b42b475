"""Fixtures of the trainer tests: the embedded checkpoint, ConceptShapes as training data, hashes of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from group_settings import GROUP_SETTINGS
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.data import load_benchmark


@pytest.fixture(scope="session")
def nano_processor() -> ConceptSegProcessor:
    return ConceptSegProcessor.from_pretrained(nano_checkpoint())


@pytest.fixture(scope="session")
def shapes() -> list:
    """Samples of the training split, in some of which the concept is absent."""
    return list(load_benchmark("concept-shapes", split="train", limit=12))


@pytest.fixture()
def make_meta_grpo(vlm_family, request, shapes, tmp_path) -> Callable[..., Any]:
    """Return a function that creates a MetaGRPOTrainer of the embedded checkpoint: groups of 4, one group per step.

    The model is a random one for other families than that of the checkpoint.
    """
    pytest.importorskip("trl", "1.16")
    from conceptseg_trainers import MetaGRPOConfig, MetaGRPOTrainer, split_reference_dataset

    def make(folder: str = "run", **settings: Any) -> MetaGRPOTrainer:
        argument_names = (
            "model",
            "train_dataset",
            "eval_dataset",
            "reward_funcs",
            "ref_model",
            "peft_config",
            "quantization_config",
        )
        arguments = {name: settings.pop(name) for name in argument_names if name in settings}
        settings = {
            **GROUP_SETTINGS,
            "per_device_eval_batch_size": 4,
            "max_completion_length": 64,
            **settings,
        }
        if vlm_family != "qwen2_5_vl":
            arguments["model"] = request.getfixturevalue("make_model")()
        elif "model" not in arguments:
            arguments["model"] = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
        if "train_dataset" not in arguments:
            arguments["train_dataset"] = split_reference_dataset(shapes)
        return MetaGRPOTrainer(
            args=MetaGRPOConfig(str(tmp_path / folder), **settings),
            processing_class=request.getfixturevalue(
                "nano_processor" if vlm_family == "qwen2_5_vl" else "processor"
            ),
            **arguments,
        )

    return make


@pytest.fixture(scope="session")
def run_two(run_two_processes) -> Callable[..., None]:
    """Return a function that runs `two_processes.py` in two processes, which write `figures.json`."""
    worker = Path(__file__).with_name("two_processes.py")

    def run(kind: str, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        result = run_two_processes(str(worker), kind, str(folder), env=environment)
        assert result.returncode == 0, result.stderr[-20000:]

    return run


@pytest.fixture(scope="session")
def weight_hash() -> Callable[[nn.Module], str]:
    """Return a function that hashes all weights of a module bit by bit."""

    def hash_of(module: nn.Module) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(module.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    return hash_of
