"""What is relied on in TRL beyond its documentation; a version that fails here needs work in `trl_adapter` alone."""

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


def test_the_trainer_hides_no_private_name_of_trl() -> None:
    meant = {"_name", "_save", "_tag_names"}  # as TRL's own trainers set them; `_save` is the Trainer's
    own = {name for name in vars(MetaGRPOTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(GRPOTrainer)) <= meant


def test_no_other_module_touches_private_names() -> None:
    private = {*ARGUMENTS, *ATTRIBUTES}
    folder = Path(conceptseg_trainers.__file__).parent
    found = {
        path.name
        for path in folder.rglob("*.py")
        if path.name != "sft_trainer.py"  # a plain Trainer, with attributes of its own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if getattr(node, "attr", getattr(node, "name", None)) in private
    }
    assert found == {Path(trl_adapter.__file__).name}


def test_the_installed_version_is_admitted() -> None:
    import tomllib  # with Python 3.11, as TRL 1.16

    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (requirement,) = (Requirement(item) for item in extras["train"] if Requirement(item).name == "trl")
    assert requirement.specifier.contains(trl.__version__)
    assert any(item.operator == "<" and item.version.count(".") == 1 for item in requirement.specifier)


def test_generation_is_replaced_for_a_while() -> None:
    class Model:
        def generate(self) -> str:
            return "own"

    model = Model()
    with pytest.raises(KeyError), trl_adapter.replaced_generate(model, lambda: "other"):
        assert model.generate() == "other"
        raise KeyError
    assert model.generate() == "own"


def test_forward_passes_without_labels_are_left_alone(model) -> None:
    """TRL's own calls without a fused head, and generation, see the model's forward."""
    calls = []

    class Inner(torch.nn.Module):
        def forward(self, **kwargs):
            calls.append(kwargs)
            return "output"

    inner = Inner()
    trl_adapter.read_prompts_once(inner, model.vlm)
    nothing = torch.full((1, 2), -100)
    assert inner(x=1) == inner(labels=nothing, fused_lm_head=True) == inner(labels=nothing + 101) == "output"
    assert [list(kwargs) for kwargs in calls] == [["x"], ["labels", "fused_lm_head"], ["labels"]]
