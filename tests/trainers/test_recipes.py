"""Tests for the shipped recipes and launch files: they can be parsed and agree with the paper."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from conceptseg_hf.data import SOURCES, SUITE
from conceptseg_hf.images import mask_to_image
from conceptseg_hf.vlm_families import get_family

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.scripts import coprs, meta_grpo, sft

FOLDER = Path(__file__).parents[2] / "trainers"
RECIPES = sorted(path.name for path in (FOLDER / "recipes").glob("*.yaml"))
LAUNCH_FILES = sorted((FOLDER / "accelerate_configs").glob("*.yaml"))
# Overrides of settings that TrainingArguments checks against the hardware.
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--optim", "adamw_torch"]


def parse(name: str):
    script = coprs if "coprs" in name else sft if name.endswith("_sft.yaml") else meta_grpo
    return script.make_parser().parse(["--config", str(FOLDER / "recipes" / name), *ON_CPU])


def test_all_recipes_exist():
    sizes = ("3b", "7b", "nano", "qwen3_4b")
    stages = [f"{size}_{stage}.yaml" for size in sizes for stage in ("sft", "meta_grpo")]
    adapters = {
        f"{name}.yaml" for name in ("3b_meta_grpo_lora", "qwen3_4b_meta_grpo_lora", "qwen3_4b_meta_grpo_80gb")
    }
    coprs_recipes = {"7b_coprs.yaml", "nano_coprs.yaml"}
    assert set(stages) | adapters | coprs_recipes == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_parse(name):
    data, model, args = parse(name)
    recipe = yaml.safe_load((FOLDER / "recipes" / name).read_text())
    parsed = {**vars(data), **vars(model), **vars(args)}
    for field in recipe.keys() - {"bf16", "report_to", "optim", "use_cpu"}:
        assert parsed[field] == recipe[field], field
    schedule = "cosine_with_min_lr" if "coprs" in name else "linear"
    assert args.seed == 42 and args.lr_scheduler_type == schedule


@pytest.mark.parametrize("size", ["3b", "7b", "qwen3_4b"])
def test_large_recipes_match_table_7(size):
    _, model, args = parse(f"{size}_sft.yaml")
    assert (args.learning_rate, args.num_train_epochs, 8 * args.per_device_train_batch_size) == (
        3e-5,
        20,
        128,
    )
    canvas_size = 608 if size == "qwen3_4b" else 600  # a multiple of the patches of Qwen3-VL
    assert (model.num_concept_tokens, model.canvas_size) == (8, canvas_size)
    assert (args.max_prompt_length, args.max_completion_length) == (2048, 768)

    data, _, args = parse(f"{size}_meta_grpo.yaml")
    assert (args.learning_rate, args.num_train_epochs, 8 * args.per_device_train_batch_size) == (1e-6, 2, 64)
    assert (args.num_generations, args.beta, data.grid) == (8, 0.04, 2)
    assert (args.max_prompt_length, args.max_completion_length) == (2048, 768)
    assert (args.seg_loss_weight, args.detach_hidden_states, args.rewards) == (
        1.0,
        False,
        ["format", "mask", "meta"],
    )


def test_defaults_match_table_7(tmp_path):
    """Hyperparameters that the recipes take from the paper are also the defaults."""
    for script, name in ((sft, "3b_sft.yaml"), (meta_grpo, "3b_meta_grpo.yaml")):
        _, _, default = script.make_parser().parse(["--output_dir", str(tmp_path), *ON_CPU])
        _, _, recipe = parse(name)
        fields = ["learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed", "beta"]
        fields += [
            "num_generations",
            "max_prompt_length",
            "max_completion_length",
            "dice_weight",
            "focal_weight",
        ]
        fields += ["focal_alpha", "focal_gamma", "seg_loss_weight", "detach_hidden_states", "loss_type"]
        for field in fields:
            assert getattr(default, field, None) == getattr(recipe, field, None), (name, field)


def test_lora_recipe_trains_adapters_and_the_ctm():
    _, policy, args = parse("3b_meta_grpo_lora.yaml")
    config = policy.peft_config(get_family("qwen2_5_vl"), ["ctm"])
    assert config.modules_to_save == ["ctm"]
    pattern = config.target_modules
    assert re.fullmatch(pattern, "vlm.model.language_model.layers.3.self_attn.q_proj")
    assert not re.fullmatch(pattern, "sam.detr_decoder.layers.0.self_attn.q_proj")
    assert not re.fullmatch(pattern, "vlm.model.visual.blocks.0.attn.proj")
    assert args.generation_batch_size == 64 and args.generation_batch_size % args.num_generations == 0
    assert "quantization_config" not in policy.load_kwargs()
    policy.load_in_4bit = True
    assert policy.load_kwargs()["quantization_config"].load_in_4bit


@pytest.mark.parametrize(("name", "four_bits"), [("lora", True), ("80gb", False)])
def test_recipes_of_qwen3_for_one_gpu_train_adapters(name, four_bits):
    _, policy, args = parse(f"qwen3_4b_meta_grpo_{name}.yaml")
    assert policy.use_peft and policy.load_in_4bit == four_bits
    assert (
        policy.peft_config(get_family("qwen3_vl"), ["ctm"]).target_modules
        == get_family("qwen3_vl").lora_target_modules
    )
    assert args.generation_batch_size == 64


def test_recipe_of_qwen3_has_the_defaults_of_its_family():
    _, model, _ = parse("qwen3_4b_sft.yaml")
    family = get_family("qwen3_vl")
    assert (model.canvas_size, model.coordinate_scale) == (family.canvas_size, family.coordinate_scale)


def test_four_bits_need_adapters(tmp_path):
    with pytest.raises(ValueError, match="so set use_peft"):
        meta_grpo.make_parser().parse(["--load_in_4bit", "true", "--output_dir", str(tmp_path), *ON_CPU])


def test_large_coprs_recipe_has_the_defaults_which_are_those_of_the_paper(tmp_path):
    _, _, default = coprs.make_parser().parse(["--output_dir", str(tmp_path), *ON_CPU])
    _, _, recipe = parse("7b_coprs.yaml")
    content = yaml.safe_load((FOLDER / "recipes" / "7b_coprs.yaml").read_text())
    changed = {
        name for name in content if hasattr(default, name) and getattr(default, name) != getattr(recipe, name)
    }
    machine = {"bf16", "report_to", "save_steps", "save_total_limit", "logging_steps", "output_dir"}
    batch = {"per_device_train_batch_size", "resume_from_checkpoint", "image_features_dir"}
    assert changed <= machine | batch, changed
    assert 8 * recipe.per_device_train_batch_size == 16 * recipe.num_generations


def test_hyperparameters_of_the_paper_cite_table_7():
    for name in (name for name in RECIPES if "coprs" not in name):
        for line in (FOLDER / "recipes" / name).read_text().splitlines():
            if re.match(r"(learning_rate|num_train_epochs|beta|num_generations|seed|max_\w+_length):", line):
                assert "Table 7" in line, (name, line)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_files_are_valid(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if path.stem == "single_gpu" else 8)


def test_recipes_name_launch_files_that_exist():
    names = {path.stem for path in LAUNCH_FILES}
    assert names == {"single_gpu", "multi_gpu", "zero2", "zero3", "fsdp2"}
    for name in RECIPES:
        for launch_file in re.findall(
            r"accelerate_configs/(\w+)\.yaml", (FOLDER / "recipes" / name).read_text()
        ):
            assert launch_file in names


LARGE = sorted(name for name in RECIPES if not name.startswith("nano") and "coprs" not in name)


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_train_on_the_datasets_of_the_paper(name, tmp_path):
    """Two items of each dataset, in the layout of the authors' release."""
    data, _, args = parse(name)
    names = data.benchmark.split(",")
    assert set(names) == {source for source in SUITE if "train" in SOURCES[source].paper_splits}
    rng = np.random.default_rng(0)
    items: dict[str, list[dict]] = {}
    for benchmark in names:
        for number in range(2):
            folder = tmp_path / benchmark
            folder.mkdir(exist_ok=True)
            image = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{number}.jpg")
            mask_to_image(image[..., 0] > 128).save(folder / f"{number}.png")
            paths = [f"{benchmark}/{number}.jpg"]
            item = {"img_path": paths, "mask_path": f"{benchmark}/{number}.png", "task_name": benchmark}
            item |= {"cls_name": "star", "dataset_name": benchmark, "problem": "find it"}
            items.setdefault(f"{benchmark}_star", []).append(item)
    (tmp_path / "all_meta.json").write_text(json.dumps({"train": items, "test": {}}))
    train, evaluation = replace(data, benchmark_root=str(tmp_path)).load(args)
    assert evaluation is None and len(train) == 2 * len(names)
    assert [sample.dataset for sample in train] == [benchmark for benchmark in names for _ in range(2)]
    assert all(sample.split == "train" and sample.mask.size == (20, 16) for sample in train)
    (few, _) = replace(data, benchmark_root=str(tmp_path), train_samples=1).load(args)
    assert len(few) == len(names)
