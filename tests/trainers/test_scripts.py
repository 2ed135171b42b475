"""Recipes at work: `conceptseg train`, resuming after a kill, two processes, and what bad input is answered with."""

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
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conceptseg_hf import ConceptSegForSegmentation, cli, nano_checkpoint
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.profiles import profile_changes

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.scripts import meta_grpo, running, sft
from conceptseg_trainers.scripts.arguments import DataArguments, ModelArguments
from conceptseg_trainers.scripts.recipe_parser import find_recipe
from conceptseg_trainers.scripts.running import find_resume_checkpoint, run
from conceptseg_trainers.sft_config import ConceptSFTConfig
from two_processes import deepspeed_config

RECIPES = Path(__file__).parents[2] / "trainers" / "recipes"
STEPS = 6


def sft_words(folder: Path, **changes) -> list[str]:
    """The command line of a few small steps of the nano recipe."""
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
    words = ["--config", str(RECIPES / "nano_sft.yaml")]
    return words + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def meta_grpo_words(folder: Path) -> list[str]:
    """The same of stage II: one group of four completions a step."""
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
    words = ["--config", str(RECIPES / "nano_meta_grpo.yaml")]
    return words + [word for name, value in options.items() for word in (f"--{name}", str(value))]


STAGES = {"sft": (sft, sft_words), "meta_grpo": (meta_grpo, meta_grpo_words)}


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The folder of a run of one process from start to end, by stage; each is made once."""

    @functools.cache
    def folder_of(stage: str) -> Path:
        folder = tmp_path_factory.mktemp(stage)
        script, words = STAGES[stage]
        run(script.prepare(words(folder)))
        return folder

    return folder_of


def trained(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_model_init_kwargs_of_a_recipe_are_used(tmp_path, caplog):
    words = meta_grpo_words(tmp_path)
    trainer = meta_grpo.prepare([*words, "--model_init_kwargs", '{"attn_implementation": "eager"}'])
    assert trainer.concept_model.vlm.config.get_text_config()._attn_implementation == "eager"
    assert "will be ignored" not in caplog.text


def test_conceptseg_train_runs_a_recipe(tmp_path, capsys):
    words = sft_words(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_samples=4)
    assert cli.main(["train", "sft", *words]) == 0
    assert (tmp_path / "config.json").is_file() and (tmp_path / "processor_config.json").is_file()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry for entry in state["log_history"] if "eval_mask_iou" in entry]
    assert len(list((tmp_path / "examples").glob("step_000002_*.png"))) == 4


@pytest.mark.slow
def test_a_run_of_meta_grpo_leaves_figures_pictures_and_a_complete_model(whole_runs):
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


FINISHED = "is finished, so nothing was trained; give another --output_dir"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A finished run of two steps at a constant rate, and its command line without a folder."""
    folder = tmp_path_factory.mktemp("two_steps")
    words = sft_words(folder, max_steps=2, save_total_limit=2, log_examples=0)
    words += ["--lr_scheduler_type", "constant", "--train_samples", "16"]
    run(sft.prepare(words))
    return folder, words


@pytest.fixture()
def copy_of_two_steps(two_steps, tmp_path):
    folder, words = two_steps
    shutil.copytree(folder, tmp_path / "run")  # with the times of its files
    return tmp_path / "run", [*words, "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("changes", [[], ["--learning_rate", "0.5"], ["--max_steps", "1"]])
def test_a_finished_run_is_left_as_it_is(copy_of_two_steps, caplog, changes):
    folder, words = copy_of_two_steps
    before = contents(folder)
    run(sft.prepare([*words, *changes]))
    assert contents(folder) == before
    assert caplog.text.count(FINISHED) == 1 and "checkpoint-2" in caplog.text


def test_a_run_of_epochs_that_is_finished_is_left_as_it_is(copy_of_two_steps, caplog):
    folder, words = copy_of_two_steps  # 16 samples, 4 a step: half an epoch
    before = contents(folder)
    run(sft.prepare([*words, "--max_steps", "-1", "--num_train_epochs", "0.5"]))
    assert contents(folder) == before and FINISHED in caplog.text


@pytest.mark.parametrize("loss", ["none saved", "an earlier one saved"])
def test_a_run_that_was_killed_before_its_model_was_saved_is_made_up_for(copy_of_two_steps, loss):
    folder, words = copy_of_two_steps
    before = contents(folder)
    for path in folder.glob("*.*"):
        if path.is_file() and loss == "none saved":
            path.unlink()
        elif path.is_file():
            os.utime(path, (0, 0))
    weights = folder / "model.safetensors"
    weights.write_bytes(b"")
    run(sft.prepare(words))
    after = contents(folder)
    assert after[str(weights)] == before[str(weights)]
    assert after.keys() == before.keys()
    run(sft.prepare(words))
    assert contents(folder) == after


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(copy_of_two_steps, caplog):
    folder, words = copy_of_two_steps
    run(sft.prepare([*words, "--max_steps", "3", "--learning_rate", "0.5"]))
    assert (folder / "checkpoint-3").is_dir() and FINISHED not in caplog.text
    assert "learning_rate is 0.5, but" in caplog.text and "goes on with its own, 0.0003" in caplog.text


def test_a_finished_run_of_meta_grpo_is_left_as_it_is(tmp_path, caplog):
    words = [*meta_grpo_words(tmp_path), "--max_steps", "1"]
    run(meta_grpo.prepare(words))
    before = contents(tmp_path)
    run(meta_grpo.prepare(words))
    assert contents(tmp_path) == before and FINISHED in caplog.text
    (tmp_path / "model.safetensors").unlink()
    os.utime(tmp_path / "processor_config.json", (0, 0))
    run(meta_grpo.prepare(words))
    after = contents(tmp_path)
    name = str(tmp_path / "model.safetensors")
    assert after[name] == before[name] and not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", [".", "run"])
def test_a_file_in_the_way_is_found_before_the_model_is_loaded(stage, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ModelArguments, "load", lambda self: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    words = STAGES[stage][1](tmp_path / "file" / place)
    assert cli.main(["train", stage.replace("_", "-"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"conceptseg train: output_dir {str(tmp_path / 'file' / place)!r} cannot be written: "
    )
    assert error.endswith("is a file; give another folder.")


def test_conceptseg_train_wants_a_recipe(capsys):
    assert cli.main(["train", "sft"]) == 2
    assert "no recipe is given; name one: --config nano_sft, for example." in capsys.readouterr().err


def test_a_run_says_that_it_resumes_and_where_results_lie(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "sft", *sft_words(Path("my run"), log_examples=1, log_examples_steps=2)]
    assert cli.main([*words, "--max_steps", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "the trained model is in 'my run', checkpoints of the run in its folders checkpoint-*.",
        "example pictures are in 'my run/examples'.",
        "try it with: conceptseg segment IMAGE --prompt TEXT --model 'my run'",
    ]
    assert cli.main([*words, "--max_steps", "3"]) == 0
    output = capsys.readouterr()
    assert "resuming from 'my run/checkpoint-2', after step 2." in output.out.splitlines()
    assert "\r" not in output.out + output.err, "bars in a pipe"


def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = sft_words(Path("run"))
    for stop, resume, said in (
        (0, "auto", "stopped after step 0; no checkpoint was saved yet, so the same command begins anew."),
        (2, "auto", "stopped after step 2; the same command goes on from 'run/checkpoint-2'."),
        (
            3,
            None,
            "stopped after step 3; with --resume_from_checkpoint auto it goes on from 'run/checkpoint-3'.",
        ),
    ):
        trainer = sft.prepare(words)
        trainer.args.resume_from_checkpoint = resume
        trainer.add_callback(Interrupt(stop))
        with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(said)}$"):
            run(trainer)


class Interrupt(TrainerCallback):
    """Ctrl-C at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_conceptseg_train_runs_meta_grpo(tmp_path):
    assert cli.main(["train", "meta-grpo", *meta_grpo_words(tmp_path), "--max_steps", "1"]) == 0
    assert (tmp_path / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(stage, whole_runs, tmp_path, environment):
    script, words = STAGES[stage]
    command = [sys.executable, "-m", f"conceptseg_trainers.scripts.{stage}", *words(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").exists()

    run(script.prepare(words(tmp_path)))  # the recipe resumes by itself
    whole = whole_runs(stage)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(tmp_path)[name]), name
    assert losses(tmp_path) == losses(whole)


# DeepSpeed would compile this operation for minutes; gloo alone will do.
WORKER = """
import sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from conceptseg_trainers.scripts import meta_grpo, sft
from conceptseg_trainers.scripts.running import main
sys.exit(main(sft.prepare))
"""


def deepspeed_words(folder: Path, stage: int) -> list[str]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(deepspeed_config(stage)))
    return ["--deepspeed", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_two_processes_are_one_with_twice_the_batches(
    kind, whole_runs, tmp_path, environment, run_two_processes
):
    whole_run = whole_runs("sft")
    words = sft_words(tmp_path, gradient_accumulation_steps=1)
    if kind == "ddp":
        program = ["-m", "conceptseg_trainers.scripts.sft", *words]
    else:
        pytest.importorskip("deepspeed")
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER)
        program = [str(worker), *words, *deepspeed_words(tmp_path, int(kind[-1]))]

    def train():
        result = run_two_processes(*program, env={**environment, "DS_ACCELERATOR": "cpu"})
        assert result.returncode == 0, result.stderr

    train()
    # One random state per process: there were two.
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert bool(list(tmp_path.glob("checkpoint-1/global_step*"))) is (kind != "ddp")  # DeepSpeed was there
    assert losses(tmp_path) == pytest.approx(losses(whole_run), abs=1e-5)
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-4)):
        expected = trained(whole_run, step)
        for name, value in trained(tmp_path, step).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=tolerance)
        assert trained(tmp_path, step).keys() == expected.keys()
    complete = ConceptSegForSegmentation.from_pretrained(tmp_path)
    for name, value in trained(tmp_path).items():
        assert torch.equal(complete.state_dict()[name], value), name

    if kind == "zero3":
        final = trained(tmp_path)
        for step in range(4, STEPS + 1):
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
        train()  # from checkpoint 3, as the recipe says
        for name, value in trained(tmp_path).items():
            assert torch.equal(value, final[name]), name


def test_adapters_train_on_a_4_bit_vlm(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    words = [*meta_grpo_words(tmp_path), "--use_peft", "true", "--load_in_4bit", "true"]
    trainer = meta_grpo.prepare([*words, "--max_steps", "2", "--learning_rate", "1e-2"])
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
        )  # biases of 4-bit layers are cast when first used
    }
    assert any("lora_" in name for name in changed) and any("ctm" in name for name in changed)
    assert [name for name in changed if "lora_" not in name and "modules_to_save" not in name] == []
    assert (tmp_path / "adapter_model.safetensors").is_file()


BAD_WORDS = {
    "no recipe": (["--config", "/nowhere.yaml"], "'/nowhere.yaml' is not a file"),
    "recipe cut off": (["--config"], "is not a file"),
    "no number": (["--learning_rate", "high"], "invalid float value: 'high'"),
    "unknown option": (["--learning_rat", "1", "--bogus", "2"], "unrecognized arguments: --bogus;"),
    "checkpointing of what is frozen": (
        ["--gradient_checkpointing", "true"],
        "the VLM is frozen and keeps no",
    ),
    "misspelled option": (["--completion_sorce", "x"], "(did you mean '--completion_source'?)"),
    "misspelled choice": (["--completion_source", "groundtruth"], "(did you mean 'ground_truth'?)"),
    "misspelled recipe": (["--config", "nano_stf"], "(did you mean 'nano_sft'?)"),
    "path of a recipe": (["--config", "/nowhere/recipes/nano_sft.yaml"], "(did you mean 'nano_sft'?)"),
    "recipe of the other stage": (
        ["--config", "nano_meta_grpo"],
        "a recipe of the other stage; those of this one",
    ),
    "unknown source": (["--completion_source", "thin_air"], "completion_source"),
    "unknown benchmark": (["--benchmark", "nothing"], "no benchmark is named 'nothing'"),
    "no samples": (["--train_samples", "0"], "train_samples is 0"),
    "no such model": (["--model_name_or_path", "/nowhere"], "/nowhere"),
    "half of the backbones": (["--vlm_name_or_path", "a/b"], "belong together"),
    "unknown tracker": (["--report_to", "paper"], "report_to is 'paper'; use one of"),
    "no checkpoint": (["--resume_from_checkpoint", "/nowhere"], "no complete checkpoint"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_input_is_answered_in_one_sentence(case, tmp_path, capsys):
    words, message = BAD_WORDS[case]
    options = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert cli.main(["train", "sft", *options, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("conceptseg train: ") and message in error
    assert not list(tmp_path.glob("out/checkpoint-*"))


BAD_META_GRPO_WORDS = {
    "unknown reward": (["--rewards", "beauty"], "rewards is ['beauty']"),
    "groups that do not fit": (
        ["--per_device_train_batch_size", "6", "--num_generations", "4"],
        "whole groups",
    ),
    "long prompt": (["--max_prompt_length", "50"], "max_prompt_length"),
    "wide grid": (["--grid", "4"], "grid is 4"),
    "4 bits": (["--load_in_4bit", "true"], "set use_peft"),
}


@pytest.mark.parametrize("case", BAD_META_GRPO_WORDS)
def test_bad_input_of_meta_grpo_is_answered_in_one_sentence(case, tmp_path, capsys):
    words, message = BAD_META_GRPO_WORDS[case]
    recipe = ["--config", str(RECIPES / "nano_meta_grpo.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", "meta-grpo", *recipe, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("conceptseg train: ") and message in error


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "learning_rates: 1.0",
            r"sets 'learning_rates', which conceptseg train sft .* \(did you mean 'learning_rate",
        ),
        ("- learning_rate", "YAML mapping"),
        ("", "YAML mapping"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_bad_recipes_are_explained(recipe, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=message):
        sft.make_parser().parse([f"--config={path}", "--output_dir", str(tmp_path)])


def test_a_recipe_is_found_by_its_name_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("nano_sft") == find_recipe("nano_sft.yaml") == RECIPES / "nano_sft.yaml"
    (tmp_path / "nano_sft").write_text("learning_rate: 0.25\noutput_dir: here")
    assert find_recipe("nano_sft") == Path("nano_sft"), "a file of one's own comes first"
    _, _, args = sft.make_parser().parse(["--config", "nano_sft"])
    assert (args.learning_rate, args.output_dir) == (0.25, "here")


@pytest.mark.parametrize("name", ["root", "benchmark_root", "benchmark-root"])
def test_the_folder_of_the_data_has_the_name_it_has_elsewhere(name, tmp_path):
    (data, *_) = sft.make_parser().parse(["--config", "nano_sft", f"--{name}", "mine"])
    assert data.benchmark_root == "mine"
    (tmp_path / "recipe.yaml").write_text(f"{name}: mine\noutput_dir: x\nenv: {{MINE_ALONE: 1}}")
    try:
        (data, *_) = sft.make_parser().parse(["--config", str(tmp_path / "recipe.yaml")])
        assert os.environ.pop("MINE_ALONE") == "1"
    finally:
        os.environ.pop("MINE_ALONE", None)
    assert data.benchmark_root == "mine"


def test_each_of_several_benchmarks_may_have_a_folder(tmp_path):
    for name in ("mine", "odd=name"):
        ConceptShapes("train", length=3, size=48).export(tmp_path / name)
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    for root in (f"plain={tmp_path / 'mine'}", str(tmp_path / "mine"), str(tmp_path / "odd=name")):
        samples, evaluation = DataArguments("plain", root).load(args)
        assert len(samples) == 3 and evaluation is None
    with pytest.raises(OSError, match="'DUTS' lacks"):
        DataArguments("plain,DUTS", f"plain={tmp_path / 'mine'},DUTS={tmp_path}").load(args)


def test_the_loader_and_the_profile_are_checked(tmp_path):
    ConceptShapes("train", length=3, size=48).export(tmp_path / "mine")
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    words = ["--benchmark", "plain", "--root", str(tmp_path / "mine"), "--output_dir", str(tmp_path)]
    data, model, _ = sft.make_parser().parse(
        [*words, "--benchmark_loader", "released", "--profile", "released"]
    )
    assert data.load(args)[0].loader == model.profile == "released"
    with pytest.raises(ValueError, match="loader is 'theirs'"):
        DataArguments("plain", str(tmp_path / "mine"), benchmark_loader="theirs").load(args)
    with pytest.raises(ValueError, match="no profile is named 'theirs'"):
        ModelArguments(profile="theirs")


def test_without_samples_for_evaluation_the_remedy_is_named(tmp_path):
    args = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1)
    message = r"no split is named 'vall' \(did you mean 'val'\?\); .* \(for the evaluation while training: give another"
    with pytest.raises(ValueError, match=message):
        DataArguments(eval_split="vall").load(args)


def test_the_command_line_beats_the_recipe(tmp_path):
    words = ["--config", str(RECIPES / "nano_sft.yaml"), "--learning_rate", "0.5"]
    _, _, args = sft.make_parser().parse(words)
    assert (args.learning_rate, args.per_device_train_batch_size) == (0.5, 32)


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_tracker_is_named_before_the_model_is_loaded(stage, tmp_path, monkeypatch, capsys):
    def never(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelArguments, "load", never)
    monkeypatch.setattr(running, "get_available_reporting_integrations", lambda: ["tensorboard"])
    words = [*STAGES[stage][1](tmp_path), "--report_to", "wandb"]
    assert cli.main(["train", stage.replace("_", "-"), *words]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "conceptseg train: report_to is 'wandb', a package that is not installed; install it with: pip install wandb"
    )


def test_optional_kernels_are_not_spoken_of():
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_missing_packages_are_named(monkeypatch, capsys):
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
        if state is not None:  # when the run was killed, or the disk was full
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find("auto") == str(tmp_path / "checkpoint-40")
    assert find(str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find(str(tmp_path / "checkpoint-300"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find(str(tmp_path / "checkpoint-400"))


def test_backbones_are_joined(model, processor, tmp_path):
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
    assert joined_processor.image_processor.patch_size == processor.image_processor.patch_size
    assert torch.equal(
        joined.vlm.get_input_embeddings().weight, model.vlm.get_input_embeddings().weight.to(joined.vlm.dtype)
    )
