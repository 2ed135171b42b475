"""Tests for the training scripts: `conceptseg train`, resuming after a kill, two processes, and error messages."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families import all_families
from safetensors.torch import load_file
from transformers import TrainerCallback

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, cli, nano_checkpoint
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.profiles import profile_changes

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.scripts import coprs, meta_grpo, running, sft
from conceptseg_trainers.scripts.arguments import DataArguments, ModelArguments
from conceptseg_trainers.scripts.recipe_parser import find_recipe
from conceptseg_trainers.scripts.running import find_resume_checkpoint, run
from conceptseg_trainers.sft_config import ConceptSFTConfig
from random_coprs import build_random_coprs
from two_processes import deepspeed_config

RECIPES = Path(__file__).parents[2] / "trainers" / "recipes"
STEPS = 6


def sft_argv(folder: Path, **changes) -> list[str]:
    """Return the command line for a few small steps of the nano recipe."""
    options = {
        "max_steps": STEPS,
        "train_samples": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "save_total_limit": STEPS,
        "eval_strategy": "no",
        "logging_steps": 1,
        "output_dir": folder,
        **changes,
    }
    argv = ["--config", str(RECIPES / "nano_sft.yaml")]
    return argv + [argument for name, value in options.items() for argument in (f"--{name}", str(value))]


def meta_grpo_argv(folder: Path) -> list[str]:
    """Return the command line for stage II, with one group of four completions per step."""
    options = {
        "max_steps": STEPS,
        "train_samples": 32,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "save_steps": 1,
        "save_total_limit": STEPS,
        "eval_strategy": "no",
        "logging_steps": 1,
        "log_examples_steps": 2,
        "output_dir": folder,
    }
    argv = ["--config", str(RECIPES / "nano_meta_grpo.yaml")]
    return argv + [argument for name, value in options.items() for argument in (f"--{name}", str(value))]


@functools.cache
def random_checkpoint() -> tuple[tempfile.TemporaryDirectory, int]:
    """Return the folder of a random CoPRS model, which is deleted at the end, and the id of its token."""
    folder = tempfile.TemporaryDirectory()
    model = build_random_coprs("sam")
    model.save_pretrained(folder.name)
    model.processor.save_pretrained(folder.name)
    return folder, model.config.ref_pos_token_id


def coprs_argv(folder: Path, **changes) -> list[str]:
    """Return the command line for CoPRS, with one group of four completions per step."""
    checkpoint, position = random_checkpoint()
    options = {
        "model_name_or_path": checkpoint.name,
        "max_steps": STEPS,
        "train_samples": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 6,
        "generation_kwargs": json.dumps({"sequence_bias": [[[position], 20.0]]}),
        "save_steps": 1,
        "save_total_limit": STEPS,
        "logging_steps": 1,
        "log_examples_steps": 2,
        "output_dir": folder,
        **changes,
    }
    argv = ["--config", str(RECIPES / "nano_coprs.yaml")]
    return argv + [argument for name, value in options.items() for argument in (f"--{name}", str(value))]


STAGES = {
    "sft": (sft, sft_argv),
    "meta_grpo": (meta_grpo, meta_grpo_argv),
    "coprs": (coprs, coprs_argv),
}


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Return a function that runs a stage in one process without interruption and returns its folder; cached."""

    @functools.cache
    def folder_of(stage: str) -> Path:
        folder = tmp_path_factory.mktemp(stage)
        script, make_argv = STAGES[stage]
        run(script.prepare(make_argv(folder)))
        return folder

    return folder_of


def trained(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_model_init_kwargs_of_a_recipe_are_used(tmp_path, caplog):
    argv = meta_grpo_argv(tmp_path)
    trainer = meta_grpo.prepare([*argv, "--model_init_kwargs", '{"attn_implementation": "eager"}'])
    assert trainer.concept_model.vlm.config.get_text_config()._attn_implementation == "eager"
    assert "will be ignored" not in caplog.text


def test_conceptseg_train_runs_a_recipe(tmp_path, capsys):
    argv = sft_argv(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_samples=4)
    assert cli.main(["train", "sft", *argv]) == 0
    assert (tmp_path / "config.json").is_file() and (tmp_path / "processor_config.json").is_file()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry for entry in state["log_history"] if "eval_mask_iou" in entry]
    assert len(list((tmp_path / "examples").glob("step_000002_*.png"))) == 4


@pytest.mark.slow
def test_meta_grpo_run_writes_logs_example_images_and_a_complete_model(whole_runs):
    folder = whole_runs("meta_grpo")
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    for name in (
        "rewards/format/mean",
        "rewards/mask/mean",
        "kl",
        "loss/seg",
        "mask_iou",
        "completions/mean_length",
    ):
        assert name in state["log_history"][0], name
    assert len(list((folder / "examples").glob("step_*.png"))) == STEPS // 2
    model = ConceptSegForSegmentation.from_pretrained(folder)
    before = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    assert not torch.equal(model.ctm.queries, before.ctm.queries)
    for name, value in before.sam.state_dict().items():
        assert torch.equal(value, model.sam.state_dict()[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


FINISHED = "is finished, so nothing was trained"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A finished run of two steps with a constant learning rate, and its command line."""
    folder = tmp_path_factory.mktemp("two_steps")
    argv = sft_argv(folder, max_steps=2, save_total_limit=2, log_examples=0)
    argv += ["--lr_scheduler_type", "constant", "--train_samples", "16"]
    run(sft.prepare(argv))
    return folder, argv


@pytest.fixture()
def copy_of_two_steps(two_steps, tmp_path):
    folder, argv = two_steps
    shutil.copytree(folder, tmp_path / "run")  # keeps modification times
    return tmp_path / "run", [*argv, "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("changes", [[], ["--learning_rate", "0.5"], ["--max_steps", "1"]])
def test_finished_run_is_not_changed(copy_of_two_steps, caplog, changes):
    folder, argv = copy_of_two_steps
    before = contents(folder)
    run(sft.prepare([*argv, *changes]))
    assert contents(folder) == before
    assert caplog.text.count(FINISHED) == 1 and "checkpoint-2" in caplog.text


def test_finished_run_of_epochs_is_not_changed(copy_of_two_steps, caplog):
    folder, argv = copy_of_two_steps  # 16 samples, 4 per step: half an epoch
    before = contents(folder)
    run(sft.prepare([*argv, "--max_steps", "-1", "--num_train_epochs", "0.5"]))
    assert contents(folder) == before and FINISHED in caplog.text


@pytest.mark.parametrize("model_state", ["missing", "outdated"])
def test_model_of_a_finished_run_is_saved_if_it_is_missing_or_outdated(copy_of_two_steps, model_state):
    folder, argv = copy_of_two_steps
    before = contents(folder)
    for path in folder.glob("*.*"):
        if path.is_file() and model_state == "missing":
            path.unlink()
        elif path.is_file():
            os.utime(path, (0, 0))
    weights = folder / "model.safetensors"
    weights.write_bytes(b"")
    run(sft.prepare(argv))
    after = contents(folder)
    assert after[str(weights)] == before[str(weights)]
    assert after.keys() == before.keys()
    run(sft.prepare(argv))
    assert contents(folder) == after


def test_finished_run_continues_with_more_steps(copy_of_two_steps, caplog):
    folder, argv = copy_of_two_steps
    run(sft.prepare([*argv, "--max_steps", "3", "--learning_rate", "0.5"]))
    assert (folder / "checkpoint-3").is_dir() and FINISHED not in caplog.text
    assert "learning_rate is 0.5, but" in caplog.text and "continues with its own, 0.0003" in caplog.text


def test_finished_run_of_meta_grpo_is_not_changed(tmp_path, caplog):
    argv = [*meta_grpo_argv(tmp_path), "--max_steps", "1"]
    run(meta_grpo.prepare(argv))
    before = contents(tmp_path)
    run(meta_grpo.prepare(argv))
    assert contents(tmp_path) == before and FINISHED in caplog.text
    (tmp_path / "model.safetensors").unlink()
    os.utime(tmp_path / "processor_config.json", (0, 0))
    run(meta_grpo.prepare(argv))
    after = contents(tmp_path)
    name = str(tmp_path / "model.safetensors")
    assert after[name] == before[name] and not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [".", "run"])
def test_output_dir_that_is_a_file_is_reported_before_the_model_is_loaded(
    stage, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ModelArguments, "load", lambda self: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / name
    argv = STAGES[stage][1](output_dir)
    assert cli.main(["train", stage.replace("_", "-"), *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"conceptseg train: output_dir {str(output_dir)!r} cannot be written: ")
    assert "is a file" in error


def test_conceptseg_train_requires_a_recipe(capsys):
    assert cli.main(["train", "sft"]) == 2
    assert "no recipe is given; give one, for example --config nano_sft." in capsys.readouterr().err


def test_run_reports_resuming_and_the_paths_of_its_results(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "sft", *sft_argv(Path("my run"), log_examples=1, log_examples_steps=2)]
    assert cli.main([*argv, "--max_steps", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "the trained model is in 'my run'; its subfolders checkpoint-* are the checkpoints of the run.",
        "example images are in 'my run/examples'.",
        "try it with: conceptseg segment IMAGE --prompt TEXT --model 'my run'",
    ]
    assert cli.main([*argv, "--max_steps", "3"]) == 0
    output = capsys.readouterr()
    assert "resuming from 'my run/checkpoint-2', after step 2." in output.out.splitlines()
    assert "\r" not in output.out + output.err, "no progress bars in a pipe"


def test_interrupted_run_reports_how_to_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = sft_argv(Path("run"))
    for stop, resume, message in (
        (
            0,
            "auto",
            "stopped after step 0; no checkpoint has been saved, so the same command starts from scratch.",
        ),
        (2, "auto", "stopped after step 2; run the same command to resume from 'run/checkpoint-2'."),
        (
            3,
            None,
            "stopped after step 3; add --resume_from_checkpoint auto to the command to resume from 'run/checkpoint-3'.",
        ),
    ):
        trainer = sft.prepare(argv)
        trainer.args.resume_from_checkpoint = resume
        trainer.add_callback(Interrupt(stop))
        with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(message)}$"):
            run(trainer)


class Interrupt(TrainerCallback):
    """Simulate Ctrl-C at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_conceptseg_train_runs_meta_grpo(tmp_path):
    assert cli.main(["train", "meta-grpo", *meta_grpo_argv(tmp_path), "--max_steps", "1"]) == 0
    assert (tmp_path / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=() if name == "meta_grpo" else pytest.mark.heavy) for name in STAGES]
)
def test_killed_run_ends_with_the_same_weights_after_resuming(stage, whole_runs, tmp_path, environment):
    script, make_argv = STAGES[stage]
    command = [sys.executable, "-m", f"conceptseg_trainers.scripts.{stage}", *make_argv(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").exists()

    run(script.prepare(make_argv(tmp_path)))  # the recipe sets resume_from_checkpoint: auto
    whole = whole_runs(stage)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(tmp_path)[name]), name
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
@pytest.mark.heavy
def test_coprs_killed_at_random_points_ends_with_the_same_weights(whole_runs, tmp_path, environment):
    """A run that is killed while it writes checkpoints or image features, and started again, loses nothing."""
    features = tmp_path / "features"
    argv = coprs_argv(tmp_path / "run", image_features_dir=features)
    command = [sys.executable, "-m", "conceptseg_trainers.scripts.coprs", *argv]
    rng = np.random.default_rng(7)
    entries = 0
    for _ in range(2):
        # Files appear one by one, so that their number marks a point of the run, also within a checkpoint.
        entries += int(rng.integers(3, 16))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while sum(1 for _ in tmp_path.rglob("*")) < entries:
                assert process.poll() is None
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").exists()
        entries = sum(1 for _ in tmp_path.rglob("*"))
    run(coprs.prepare(argv))
    whole = whole_runs("coprs")  # without stored features
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(tmp_path / "run")[name]), name
    assert losses(tmp_path / "run") == losses(whole)


# Skips the compilation of a DeepSpeed operation, which takes minutes and is not needed with gloo.
WORKER = """
import sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from conceptseg_trainers.scripts import meta_grpo, sft
from conceptseg_trainers.scripts.running import main
sys.exit(main(sft.prepare))
"""


def deepspeed_options(folder: Path, stage: int) -> list[str]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(deepspeed_config(stage)))
    return ["--deepspeed", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.heavy) for kind in ("zero2", "zero3"))]
)
def test_two_processes_match_one_process_with_accumulation(
    kind, whole_runs, tmp_path, environment, run_two_processes
):
    whole_run = whole_runs("sft")
    argv = sft_argv(tmp_path, gradient_accumulation_steps=1)
    if kind == "ddp":
        program = ["-m", "conceptseg_trainers.scripts.sft", *argv]
    else:
        pytest.importorskip("deepspeed")
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER)
        program = [str(worker), *argv, *deepspeed_options(tmp_path, int(kind[-1]))]

    def train():
        result = run_two_processes(*program, env={**environment, "DS_ACCELERATOR": "cpu"})
        assert result.returncode == 0, result.stderr

    train()
    # One random state per process shows that there were two.
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert bool(list(tmp_path.glob("checkpoint-1/global_step*"))) is (kind != "ddp")  # DeepSpeed was used
    assert losses(tmp_path) == pytest.approx(losses(whole_run), abs=1e-5)
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-4)):
        weights, expected = trained(tmp_path, step), trained(whole_run, step)
        assert weights.keys() == expected.keys()
        differences = torch.cat([(value - expected[name]).abs().flatten() for name, value in weights.items()])
        # Where a gradient is rounding noise, Adam's step has full size in an arbitrary direction.
        assert (differences > tolerance).float().mean() < 1e-3, (step, differences.max())
    complete = ConceptSegForSegmentation.from_pretrained(tmp_path)
    for name, value in trained(tmp_path).items():
        assert torch.equal(complete.state_dict()[name], value), name

    if kind == "zero3":
        final = trained(tmp_path)
        for step in range(4, STEPS + 1):
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
        train()  # resumes from checkpoint 3
        for name, value in trained(tmp_path).items():
            assert torch.equal(value, final[name]), name


def test_adapters_can_be_trained_on_a_4_bit_vlm(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    argv = [*meta_grpo_argv(tmp_path), "--use_peft", "true", "--load_in_4bit", "true"]
    trainer = meta_grpo.prepare([*argv, "--max_steps", "2", "--learning_rate", "1e-2"])
    four_bit = {
        name
        for name, module in trainer.concept_model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert any("language_model" in name for name in four_bit)
    assert not any(name.startswith(("ctm", "sam", "lm_head")) for name in four_bit)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    run(trainer)
    changed = {
        name
        for name, value in trainer.model.named_parameters()
        if not torch.equal(
            value, before[name].to(value.dtype)
        )  # biases of 4-bit layers are cast on first use
    }
    assert any("lora_" in name for name in changed) and any("ctm" in name for name in changed)
    assert [name for name in changed if "lora_" not in name and "modules_to_save" not in name] == []
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_coprs_trains_adapters(tmp_path):
    argv = coprs_argv(tmp_path, use_peft="true", max_steps=1, learning_rate=1e-3, save_steps=1)
    trainer = coprs.prepare(argv)
    trained_names = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or ".modules_to_save." in name for name in trained_names)
    for part in ("lora_", ".prior.", ".mask_embed.", ".mask_decoder."):
        assert any(part in name for name in trained_names), part
    run(trainer)
    assert (tmp_path / "adapter_model.safetensors").is_file()


BAD_ARGUMENTS = {
    "no recipe": (["--config", "/nowhere.yaml"], "'/nowhere.yaml' is neither a file"),
    "missing recipe name": (["--config"], "is neither a file"),
    "not a number": (["--learning_rate", "high"], "invalid float value: 'high'"),
    "unknown option": (["--learning_rat", "1", "--bogus", "2"], "unrecognized arguments: --bogus;"),
    "gradient checkpointing of a frozen model": (
        ["--gradient_checkpointing", "true"],
        "the VLM is frozen and stores no",
    ),
    "misspelled option": (["--completion_sorce", "x"], "(did you mean '--completion_source'?)"),
    "misspelled choice": (["--completion_source", "groundtruth"], "(did you mean 'ground_truth'?)"),
    "misspelled recipe": (["--config", "nano_stf"], "(did you mean 'nano_sft'?)"),
    "path of a recipe": (["--config", "/nowhere/recipes/nano_sft.yaml"], "(did you mean 'nano_sft'?)"),
    "recipe of the other stage": (
        ["--config", "nano_meta_grpo"],
        "this is a recipe of another stage",
    ),
    "unknown source": (["--completion_source", "thin_air"], "completion_source"),
    "unknown benchmark": (["--benchmark", "nothing"], "no benchmark is named 'nothing'"),
    "no samples": (["--train_samples", "0"], "train_samples is 0"),
    "missing model": (["--model_name_or_path", "/nowhere"], "/nowhere"),
    "only one backbone": (["--vlm_name_or_path", "a/b"], "only one of vlm_name_or_path and"),
    "unknown tracker": (["--report_to", "paper"], "report_to is 'paper'; use one of"),
    "missing checkpoint": (["--resume_from_checkpoint", "/nowhere"], "not a complete checkpoint"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_reported_in_one_sentence(case, tmp_path, capsys):
    argv, message = BAD_ARGUMENTS[case]
    options = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert cli.main(["train", "sft", *options, *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("conceptseg train: ") and message in error
    assert not list(tmp_path.glob("out/checkpoint-*"))


BAD_META_GRPO_ARGUMENTS = {
    "unknown reward": (["--rewards", "beauty"], "rewards is ['beauty']"),
    "groups that do not fit": (
        ["--per_device_train_batch_size", "6", "--num_generations", "4"],
        "whole groups",
    ),
    "long prompt": (["--max_prompt_length", "50"], "max_prompt_length"),
    "wide grid": (["--grid", "4"], "grid is 4"),
    "4 bits": (["--load_in_4bit", "true"], "set use_peft"),
}


@pytest.mark.parametrize("case", BAD_META_GRPO_ARGUMENTS)
def test_bad_input_of_meta_grpo_is_reported_in_one_sentence(case, tmp_path, capsys):
    argv, message = BAD_META_GRPO_ARGUMENTS[case]
    recipe = ["--config", str(RECIPES / "nano_meta_grpo.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", "meta-grpo", *recipe, *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("conceptseg train: ") and message in error


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "learning_rates: 1.0",
            r"sets 'learning_rates', which is not a field of conceptseg train sft \(did you mean 'learning_rate",
        ),
        ("- learning_rate", "YAML mapping"),
        ("", "YAML mapping"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_bad_recipes_are_reported(recipe, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=message):
        sft.make_parser().parse([f"--config={path}", "--output_dir", str(tmp_path)])


def test_recipe_is_found_by_its_name_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("nano_sft") == find_recipe("nano_sft.yaml") == RECIPES / "nano_sft.yaml"
    (tmp_path / "nano_sft").write_text("learning_rate: 0.25\noutput_dir: here")
    assert find_recipe("nano_sft") == Path("nano_sft"), "a local file takes precedence"
    _, _, args = sft.make_parser().parse(["--config", "nano_sft"])
    assert (args.learning_rate, args.output_dir) == (0.25, "here")


@pytest.mark.parametrize("name", ["root", "benchmark_root", "benchmark-root"])
def test_aliases_of_benchmark_root(name, tmp_path):
    (data, *_) = sft.make_parser().parse(["--config", "nano_sft", f"--{name}", "mine"])
    assert data.benchmark_root == "mine"
    (tmp_path / "recipe.yaml").write_text(f"{name}: mine\noutput_dir: x\nenv: {{MINE_ALONE: 1}}")
    try:
        (data, *_) = sft.make_parser().parse(["--config", str(tmp_path / "recipe.yaml")])
        assert os.environ.pop("MINE_ALONE") == "1"
    finally:
        os.environ.pop("MINE_ALONE", None)
    assert data.benchmark_root == "mine"


def test_benchmark_root_per_benchmark(tmp_path):
    for name in ("mine", "odd=name"):
        ConceptShapes("train", length=3, size=48).export(tmp_path / name)
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    for root in (f"plain={tmp_path / 'mine'}", str(tmp_path / "mine"), str(tmp_path / "odd=name")):
        samples, evaluation = DataArguments("plain", root).load(args)
        assert len(samples) == 3 and evaluation is None
    with pytest.raises(OSError, match="'DUTS' lacks"):
        DataArguments("plain,DUTS", f"plain={tmp_path / 'mine'},DUTS={tmp_path}").load(args)


def test_loader_and_profile_are_checked(tmp_path):
    ConceptShapes("train", length=3, size=48).export(tmp_path / "mine")
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    argv = ["--benchmark", "plain", "--root", str(tmp_path / "mine"), "--output_dir", str(tmp_path)]
    data, model, _ = sft.make_parser().parse(
        [*argv, "--benchmark_loader", "released", "--profile", "released"]
    )
    assert data.load(args)[0].loader == model.profile == "released"
    with pytest.raises(ValueError, match="loader is 'theirs'"):
        DataArguments("plain", str(tmp_path / "mine"), benchmark_loader="theirs").load(args)
    with pytest.raises(ValueError, match="unknown profile 'theirs'"):
        ModelArguments(profile="theirs")


def test_error_for_a_missing_evaluation_split_names_the_remedy(tmp_path):
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1)
    message = r"no split is named 'vall' \(did you mean 'val'\?\); .* \(for the evaluation during training: use another"
    with pytest.raises(ValueError, match=message):
        DataArguments(eval_split="vall").load(args)


def test_command_line_overrides_the_recipe(tmp_path):
    argv = ["--config", str(RECIPES / "nano_sft.yaml"), "--learning_rate", "0.5"]
    _, _, args = sft.make_parser().parse(argv)
    assert (args.learning_rate, args.per_device_train_batch_size) == (0.5, 32)


@pytest.mark.parametrize("stage", STAGES)
def test_missing_tracker_is_reported_before_the_model_is_loaded(stage, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelArguments, "load", fail)
    monkeypatch.setattr(running, "get_available_reporting_integrations", lambda: ["tensorboard"])
    argv = [*STAGES[stage][1](tmp_path), "--report_to", "wandb"]
    assert cli.main(["train", stage.replace("_", "-"), *argv]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "conceptseg train: report_to is 'wandb', a package that is not installed; install it with: pip install wandb"
    )


def test_no_warning_about_optional_kernels():
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_missing_packages_are_reported(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("conceptseg_trainers.scripts.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main(["train", "sft"]) == 2
    assert "pip install conceptseg-hf[train]" in capsys.readouterr().err


def test_resuming_from_the_last_complete_checkpoint(tmp_path):
    def find(value):
        args = ConceptSFTConfig(output_dir=str(tmp_path), resume_from_checkpoint=value, use_cpu=True)
        return find_resume_checkpoint(args)

    assert find(None) is None and find("auto") is None
    for step, state in ((5, "{}"), (40, "{}"), (300, None), (400, '{"best'), (500, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:  # None if the run was killed or the disk was full
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find("auto") == str(tmp_path / "checkpoint-40")
    assert find(str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        find(str(tmp_path / "checkpoint-300"))
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        find(str(tmp_path / "checkpoint-400"))


@all_families
def test_model_is_built_from_backbones(model, processor, vlm_family, tmp_path):
    model.vlm.save_pretrained(tmp_path / "vlm")
    processor.tokenizer.save_pretrained(tmp_path / "vlm")
    processor.image_processor.save_pretrained(tmp_path / "vlm")
    model.sam.save_pretrained(tmp_path / "sam")
    processor.sam_tokenizer.save_pretrained(tmp_path / "sam")
    processor.sam_image_processor.save_pretrained(tmp_path / "sam")
    arguments = ModelArguments(
        vlm_name_or_path=str(tmp_path / "vlm"),
        sam_name_or_path=str(tmp_path / "sam"),
        num_concept_tokens=3,
        canvas_size=64,
        coordinate_scale=64,
        profile="released",
    )
    joined, joined_processor = arguments.load()
    assert joined.config.profile == "released" and joined.config.end_of_turn_state
    assert profile_changes("released", joined.config, joined_processor) == {}
    assert joined.config.ctm_config.num_queries == 3
    assert (joined_processor.canvas_size, joined_processor.coordinate_scale) == (64, 64)
    assert joined_processor.vlm_family == vlm_family
    assert joined_processor.image_processor.to_dict() == processor.image_processor.to_dict()
    defaults = ConceptSegProcessor.from_backbones(tmp_path / "vlm", tmp_path / "sam")
    family = processor.family
    assert (defaults.canvas_size, defaults.coordinate_scale) == (family.canvas_size, family.coordinate_scale)
    assert torch.equal(
        joined.vlm.get_input_embeddings().weight, model.vlm.get_input_embeddings().weight.to(joined.vlm.dtype)
    )
