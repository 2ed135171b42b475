"""Checkpoints and models are written whole or not at all, and what was there before survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.checkpoints import complete_checkpoints, is_complete, staged, checkpoint_writer

import conceptseg_hf
from conceptseg_hf.writing import WriteError

ROOT = Path(conceptseg_hf.__file__).parents[1]

# Trains with files limited to so many bytes from the step that is named: what a disk is that fills up.
LIMITED = """
import json, resource, sys
from transformers import TrainerCallback
from conceptseg_hf import cli
from conceptseg_trainers.scripts import running

class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    def on_train_end(self, args, state, control, **kwargs):
        if int(sys.argv[2]) < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))

run = running.run
running.run = lambda trainer: trainer.add_callback(Fill()) or run(trainer)
code = cli.main(json.loads(sys.argv[3]))
sys.exit(code)
"""


def words_of(folder: Path, steps: int) -> list[str]:
    words = ["train", "sft", "--config", "nano_sft", "--output_dir", str(folder), "--max_steps", str(steps)]
    words += ["--train_samples", "8", "--per_device_train_batch_size", "2", "--eval_strategy", "no"]
    return [*words, "--save_steps", "1", "--log_examples", "0"]


def run_limited(limit: int, step: int, words: list[str]) -> tuple[int, str]:
    pytest.importorskip("resource")
    path = os.pathsep.join([str(ROOT), str(ROOT / "trainers")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LIMITED, str(limit), str(step), json.dumps(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (100_000, "File too large"),  # the weights
        (
            4_000_000,
            "PyTorch could write a file only in part, as on a full disk",
        ),  # the optimizer, which is larger
    ],
)
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_later(limit, reason, tmp_path):
    code, error = run_limited(limit, 2, words_of(tmp_path / "run", 4))
    last, lost = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 3))
    assert code == 2
    assert error == (
        f"conceptseg train: {lost!r} cannot be written: {reason}; make room and resume, or give another output_dir; "
        f"{last!r} is complete."
    )
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["checkpoint-1", "checkpoint-2"]
    assert all(map(is_complete, (tmp_path / "run").iterdir()))


def test_a_model_that_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path):
    """The checkpoints have room; the complete model, which is larger, has not."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_text("an older model")
    code, error = run_limited(6_000_000, -1, words_of(run, 1))
    assert code == 2
    said = f"conceptseg train: {str(run)!r} cannot be written: File too large; make room, or give another folder."
    assert error == said
    assert {path.name for path in run.iterdir()} == {"checkpoint-1", "model.safetensors"}
    assert (run / "model.safetensors").read_text() == "an older model"


# -- parts --


@pytest.fixture()
def run_folder(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-old").mkdir()
    return tmp_path


def test_complete_checkpoints_come_in_the_order_of_their_steps(run_folder):
    (run_folder / "checkpoint-30").mkdir()
    assert [path.name for path in complete_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-10"]
    assert complete_checkpoints(run_folder / "nowhere") == []


@pytest.mark.parametrize(
    "error", [OSError(28, "x"), SafetensorError("x"), KeyboardInterrupt(), ValueError("a bug")]
)
def test_half_a_checkpoint_is_removed_whatever_ended_it(run_folder, error):
    checkpoint = run_folder / "checkpoint-20"
    expected = WriteError if isinstance(error, (OSError, SafetensorError)) else type(error)
    with pytest.raises(expected) as raised, checkpoint_writer(checkpoint, run_folder, is_writer=True):
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_text("half")
        raise error
    assert not checkpoint.exists()
    if expected is WriteError:
        assert str(raised.value).endswith(f"'{run_folder / 'checkpoint-10'}' is complete.")


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError])
def test_an_error_after_a_checkpoint_is_complete_keeps_it(run_folder, error):
    checkpoint = run_folder / "checkpoint-20"
    with pytest.raises(error, match=r"^push failed$"), checkpoint_writer(checkpoint, run_folder, is_writer=True):
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        raise error("push failed")
    assert is_complete(checkpoint)


def test_a_staged_model_takes_the_place_of_an_older_one(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*names, "model.safetensors.index.json", "README.md", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-1").mkdir()
    with staged(tmp_path, is_writer=True) as folder:
        assert (folder / "README.md").read_text() == "old", "which tells that there is a card"
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("new")
        (folder / "processor_config.json").write_text("new")
        assert (tmp_path / names[0]).read_text() == "old", "until all is there"
    assert {path.name for path in tmp_path.iterdir()} == {
        *(
            "checkpoint-1",
            "model.safetensors",
            "tokenizer",
            "processor_config.json",
            "README.md",
            "notes.txt",
        ),
    }
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))


def test_a_model_that_is_not_saved_to_its_end_changes_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    with (
        pytest.raises(WriteError, match="cannot be written: No space left"),
        staged(tmp_path, True) as folder,
    ):
        (folder / "model.safetensors").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.safetensors": "old"}


def test_processes_that_do_not_write_touch_nothing(tmp_path):
    with staged(tmp_path, is_writer=False) as folder:
        assert folder.parent == tmp_path
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(WriteError), checkpoint_writer(tmp_path / "checkpoint-1", tmp_path, is_writer=False):
        raise OSError(28, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
