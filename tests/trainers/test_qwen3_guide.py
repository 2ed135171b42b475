"""The commands of docs/qwen3.md, with their recipes, a tiny random Qwen3-VL and one step per stage on the CPU."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import conceptseg_hf
from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor

pytest.importorskip("trl", "1.16")
from conceptseg_trainers.nano import __main__ as nano
from conceptseg_trainers.nano.tokenizers import build_processor
from conceptseg_trainers.scripts.running import run

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import AuthorsTree

GUIDE = Path(conceptseg_hf.__file__).parents[1] / "docs" / "qwen3.md"
# Appended, where an option given twice has its last value: one sample of each dataset, one step, and no GPU.
SHORTENED = {
    "train_samples": 1,
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "max_completion_length": 8,
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
    "optim": "adamw_torch",
    "dataloader_num_workers": 0,
    "gradient_checkpointing": "false",
    "log_examples": 0,
    "logging_steps": 1,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The backbones and the training sets, under the names of the recipes."""
    folder = tmp_path_factory.mktemp("guide")
    from transformers import Sam3Processor  # it requires torchvision or the shim of conceptseg_hf

    torch.manual_seed(0)
    config = ConceptSegConfig.from_preset("nano-qwen3")
    config.sam_config.text_config.max_position_embeddings = 32  # as in the released SAM 3
    model = ConceptSegForSegmentation(config)
    processor = build_processor("qwen3_vl")
    vlm, sam = folder / "Qwen" / "Qwen3-VL-4B-Instruct", folder / "facebook" / "sam3"
    model.vlm.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.vlm.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.vlm.save_pretrained(vlm)
    processor.vlm_processor().save_pretrained(vlm)
    model.sam.save_pretrained(sam)
    Sam3Processor(processor.sam_image_processor, processor.sam_tokenizer).save_pretrained(sam)
    tree = AuthorsTree(folder / "data" / "ConceptSeg-Benchmark")
    for dataset in ("DUTS", "COD10K1024", "fewshot1000", "CoSOD3k1024", "MGrounding"):
        for number in range(3):
            tree.add("train", dataset, f"{dataset}_star", f"train_{number}", problem="star")
    tree.write()
    return folder


def commands(pattern: str) -> list[str]:
    """Return the parts of the commands of the guide that match a pattern with one group."""
    blocks = re.findall(r"```\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    return [found for block in blocks for found in re.findall(pattern, block)]


def train(command: str, **changes) -> Path:
    """Run `MODULE --config RECIPE` with shortened options, and return the folder of the result."""
    module, *words = shlex.split(command)
    shortened = [
        word for name, value in {**SHORTENED, **changes}.items() for word in (f"--{name}", str(value))
    ]
    trainer = importlib.import_module(module).prepare([*words, *shortened])
    run(trainer)
    assert trainer.state.global_step == 1
    return Path(trainer.args.output_dir)


def test_stages_run_from_the_backbones_to_a_complete_model(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    sft, meta_grpo = commands(r"-m (conceptseg_trainers\.scripts.*)")
    first = train(sft, canvas_size=64, per_device_train_batch_size=2, generation_batch_size=2)
    processor = ConceptSegProcessor.from_pretrained(first)
    assert (processor.vlm_family, processor.coordinate_scale) == ("qwen3_vl", 1000)
    second = train(meta_grpo, per_device_train_batch_size=4, num_generations=4, learning_rate=1e-3)
    backbone = load_file(folder / "Qwen" / "Qwen3-VL-4B-Instruct" / "model.safetensors")
    states = [load_file(path / "model.safetensors") for path in (first, second)]
    name = "model.visual.deepstack_merger_list.0.linear_fc1.weight"
    assert torch.equal(states[0][f"vlm.{name}"], backbone[name])  # stage I trains the CTM only
    assert not torch.equal(states[1][f"vlm.{name}"], backbone[name])
    assert not torch.equal(states[0]["ctm.queries"], states[1]["ctm.queries"])


@pytest.mark.parametrize("recipe", ["qwen3_4b_meta_grpo_80gb"])
def test_adapters_are_trained_from_the_model_of_stage_one(folder, monkeypatch, recipe) -> None:
    """The recipe of one GPU; with 4 bits, it needs a GPU."""
    monkeypatch.chdir(folder)
    assert recipe in GUIDE.read_text(encoding="utf-8")
    torch.manual_seed(0)
    backbones = ("Qwen/Qwen3-VL-4B-Instruct", "facebook/sam3")
    model = ConceptSegForSegmentation.from_backbones(*backbones, ctm_config={"num_attention_heads": 4})
    model.save_pretrained("stage_one")
    ConceptSegProcessor.from_backbones(*backbones, canvas_size=64).save_pretrained("stage_one")
    result = train(
        f"conceptseg_trainers.scripts.meta_grpo --config {recipe}",
        model_name_or_path="stage_one",
        per_device_train_batch_size=4,
        num_generations=4,
    )
    config = json.loads((result / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["modules_to_save"]) == (16, ["ctm"])


def test_command_for_a_small_one_selects_the_family(monkeypatch) -> None:
    (arguments,) = commands(r'make nano NANO_ARGS="(.*)"')
    parsed = []
    monkeypatch.setattr(nano, "_run", parsed.append)
    monkeypatch.setattr("sys.argv", ["nano", *shlex.split(arguments)])
    nano.main()
    assert (parsed[0].family, str(parsed[0].run_dir)) == ("qwen3_vl", "runs/nano-qwen3")
