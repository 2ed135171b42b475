"""Tests that checkpoints and models are written completely or not at all, and that previous files are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.checkpoints import checkpoint_writer, complete_checkpoints, is_complete, staged
from conceptseg_trainers.scripts import running

from conceptseg_hf import cli
from conceptseg_hf.writing import WriteError


def make_argv(folder: Path, steps: int) -> list[str]:
    argv = ["train", "sft", "--config", "nano_sft", "--output_dir", str(folder), "--max_steps", str(steps)]
    argv += ["--train_samples", "8", "--per_device_train_batch_size", "2", "--eval_strategy", "no"]
    return [*argv, "--save_steps", "1", "--log_examples", "0"]


@pytest.fixture()
def run_limited(
    limited_files, monkeypatch, capsys
) -> Callable[[int, int | None, list[str]], tuple[int, str]]:
    """Return a function that trains on a disk which is full from a step on (None: from the end on).

    It returns the exit code and the last line of standard error.
    """

    def run_command(limit: int, step: int | None, argv: list[str]) -> tuple[int, str]:
        class Fill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    stack.enter_context(limited_files(limit))

            def on_train_end(self, args, state, control, **kwargs):
                if step is None:
                    stack.enter_context(limited_files(limit))

        run = running.run
        monkeypatch.setattr(running, "run", lambda trainer: trainer.add_callback(Fill()) or run(trainer))
        with ExitStack() as stack:
            code = cli.main(argv)
        return code, capsys.readouterr().err.splitlines()[-1]

    return run_command


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (100_000, "File too large"),  # the weights
        (
            4_000_000,
            "PyTorch wrote a file only partially",
        ),  # the optimizer states, which are larger
    ],
)
def test_full_disk_is_reported_in_one_sentence_and_keeps_complete_checkpoints(
    limit, reason, run_limited, tmp_path
):
    code, error = run_limited(limit, 2, make_argv(tmp_path / "run", 4))
    complete, incomplete = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 3))
    assert code == 2
    assert error.startswith(f"conceptseg train: {incomplete!r} cannot be written: {reason}")
    assert "or use another output_dir" in error and error.endswith(f"{complete!r} is complete.")
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["checkpoint-1", "checkpoint-2"]
    assert all(map(is_complete, (tmp_path / "run").iterdir()))


def test_model_that_cannot_be_saved_does_not_change_the_folder(run_limited, tmp_path):
    """The checkpoints fit on the disk, but the complete model, which is larger, does not."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_text("an older model")
    code, error = run_limited(6_000_000, None, make_argv(run, 1))
    assert code == 2
    assert error.startswith(f"conceptseg train: {str(run)!r} cannot be written: File too large; ")
    assert {path.name for path in run.iterdir()} == {"checkpoint-1", "model.safetensors"}
    assert (run / "model.safetensors").read_text() == "an older model"


# -- functions --


@pytest.fixture()
def run_folder(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-old").mkdir()
    return tmp_path


def test_complete_checkpoints_are_ordered_by_step(run_folder):
    (run_folder / "checkpoint-30").mkdir()
    assert [path.name for path in complete_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-10"]
    assert complete_checkpoints(run_folder / "nowhere") == []


@pytest.mark.parametrize(
    "error", [OSError(28, "x"), SafetensorError("x"), KeyboardInterrupt(), ValueError("a bug")]
)
def test_incomplete_checkpoint_is_removed_after_any_error(run_folder, error):
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
def test_error_after_a_checkpoint_is_complete_keeps_it(run_folder, error):
    checkpoint = run_folder / "checkpoint-20"
    with (
        pytest.raises(error, match=r"^push failed$"),
        checkpoint_writer(checkpoint, run_folder, is_writer=True),
    ):
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
        raise error("push failed")
    assert is_complete(checkpoint)


def test_staged_model_replaces_an_older_one(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*names, "model.safetensors.index.json", "README.md", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-1").mkdir()
    with staged(tmp_path, is_writer=True) as folder:
        assert (folder / "README.md").read_text() == "old", (
            "the existing card is visible in the staging folder"
        )
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text("new")
        (folder / "processor_config.json").write_text("new")
        assert (tmp_path / names[0]).read_text() == "old", "not replaced before all files are written"
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


def test_partially_saved_model_changes_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    with (
        pytest.raises(WriteError, match="cannot be written: No space left"),
        staged(tmp_path, True) as folder,
    ):
        (folder / "model.safetensors").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.safetensors": "old"}


def test_other_processes_do_not_change_files(tmp_path):
    with staged(tmp_path, is_writer=False) as folder:
        assert folder.parent == tmp_path
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(WriteError), checkpoint_writer(tmp_path / "checkpoint-1", tmp_path, is_writer=False):
        raise OSError(28, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
