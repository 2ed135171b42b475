"""Tests for the private names of TRL that are used; if a version fails here, only `trl_adapter` has to change."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.16")
import conceptseg_trainers
import trl
from conceptseg_trainers import MetaGRPOTrainer, trl_adapter
from conceptseg_trainers.trl_adapter import PRIVATE_NAMES, GRPOTrainerAdapter, VLLMGenerationAdapter
from packaging.requirements import Requirement
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

ARGUMENTS = {
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["model", "inputs"],
    "_generate_and_score_completions": ["inputs"],
    "_init_vllm": [],
    "_iter_named_params": [],
    "_log_completion_extra": ["column", "values"],
    "_log_metric": ["name", "value"],
    "_prepare_inputs": ["generation_batch"],
}
ATTRIBUTES = ("_buffered_inputs", "_last_loaded_step", "_metrics", "_step")


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner in PRIVATE_NAMES for name in PRIVATE_NAMES[owner]]
)
def test_private_methods_take_the_known_arguments(owner, name) -> None:
    assert name in vars(owner)
    assert list(inspect.signature(getattr(owner, name)).parameters)[1:] == ARGUMENTS[name]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_private_attributes_are_set_by_trl(name) -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(GRPOTrainer)))
    assigned = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert name in assigned


def test_every_override_is_listed() -> None:
    for adapter, owner in ((GRPOTrainerAdapter, GRPOTrainer), (VLLMGenerationAdapter, VLLMGeneration)):
        overridden = {name for name in vars(adapter) if name.startswith("_") and not name.startswith("__")}
        overridden &= set(dir(owner))
        assert overridden <= set(PRIVATE_NAMES[owner])


def test_trainer_overrides_no_private_name_of_trl() -> None:
    intended = {"_name", "_save", "_tag_names"}  # TRL's own trainers set them; `_save` belongs to the Trainer
    own = {name for name in vars(MetaGRPOTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(GRPOTrainer)) <= intended


def test_no_other_module_uses_private_names() -> None:
    private = {*ARGUMENTS, *ATTRIBUTES}
    folder = Path(conceptseg_trainers.__file__).parent
    users = {
        path.name
        for path in folder.rglob("*.py")
        if path.name != "sft_trainer.py"  # a Trainer without TRL, with its own attributes
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if getattr(node, "attr", getattr(node, "name", None)) in private
    }
    assert users == {Path(trl_adapter.__file__).name}


def test_installed_version_is_allowed() -> None:
    import tomllib  # needs Python 3.11, as does TRL 1.16

    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (requirement,) = (Requirement(item) for item in extras["train"] if Requirement(item).name == "trl")
    assert requirement.specifier.contains(trl.__version__)
    assert any(item.operator == "<" and item.version.count(".") == 1 for item in requirement.specifier)


def test_generate_is_replaced_temporarily() -> None:
    class Model:
        def generate(self) -> str:
            return "own"

    model = Model()
    with pytest.raises(KeyError), trl_adapter.replaced_generate(model, lambda: "other"):
        assert model.generate() == "other"
        raise KeyError
    assert model.generate() == "own"


def test_forward_passes_without_labels_are_not_changed(model) -> None:
    """Generation, and calls of TRL without a fused head, use the original forward pass."""
    calls = []

    class Inner(torch.nn.Module):
        def forward(self, **kwargs):
            calls.append(kwargs)
            return "output"

    inner = Inner()
    trl_adapter.read_prompts_once(inner, model.vlm)
    ignored = torch.full((1, 2), -100)
    assert inner(x=1) == inner(labels=ignored, fused_lm_head=True) == inner(labels=ignored + 101) == "output"
    assert [list(kwargs) for kwargs in calls] == [["x"], ["labels", "fused_lm_head"], ["labels"]]
