"""Tests that a diverged training stops, names the last good checkpoint, and saves no weights that are not finite."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.checkpoints import complete_checkpoints, last_good_checkpoint
from conceptseg_trainers.divergence import DivergedError, FiniteLogs
from conceptseg_trainers.from_scratch.loop import Schedule, TrainingState, train
from conceptseg_trainers.sft_config import ConceptSFTConfig
from conceptseg_trainers.sft_trainer import ConceptSFTTrainer

from conceptseg_hf import ConceptSegForSegmentation, cli, nano_checkpoint

NAN = float("nan")


def reject_constant(name: str):
    raise AssertionError(f"{name} is not valid JSON")


class Break(TrainerCallback):
    """Set a weight to NaN at a given step, as after a gradient that is not finite."""

    def __init__(self, trainer, step: int, event: str) -> None:
        self.trainer, self.step = trainer, step
        setattr(self, event, self._break)

    def _break(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.trainer.concept_model.ctm.queries.view(-1)[0] = NAN


@pytest.fixture()
def make_trainer(nano_processor, shapes, tmp_path, make_meta_grpo):
    def make(stage, **settings):
        settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **settings}
        if stage == "meta-grpo":
            return make_meta_grpo(**settings)
        args = ConceptSFTConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=2,
            log_examples=0,
            **settings,
        )
        model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
        return ConceptSFTTrainer(model, args, shapes, shapes[:2], nano_processor)

    return make


STAGES = ["sft", "meta-grpo"]


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_loss_names_the_last_good_checkpoint(stage, make_trainer, tmp_path):
    """The weights after step 3 are NaN, so the checkpoint of step 2 is the last one with a finite loss."""
    trainer = make_trainer(stage)
    trainer.add_callback(Break(trainer, 3, "on_step_begin"))
    good = re.escape(str(tmp_path / "run" / "checkpoint-2"))
    message = rf"^the training diverged: the loss is nan in step 4; the last good checkpoint is '{good}'; "
    with pytest.raises(DivergedError, match=message + "train again with a learning_rate below .*$"):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")][-1] == "checkpoint-3"


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_weights_are_not_saved(stage, make_trainer, tmp_path):
    """No loss is computed after the last step, so the weights are checked."""
    trainer = make_trainer(stage, max_steps=3)
    trainer.add_callback(Break(trainer, 3, "on_step_end"))
    message = (
        r"weights are not finite after step 3 \(ctm\.queries, \.\.\.\); the last good checkpoint is '.*-2'"
    )
    with pytest.raises(DivergedError, match=message):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(DivergedError, match="weights are not finite"):
        trainer.save_model()
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_nonfinite_evaluation_loss_stops_the_training(make_trainer):
    trainer = make_trainer("sft", eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Break(trainer, 2, "on_step_end"))
    with pytest.raises(
        DivergedError, match=r"the loss is nan in the evaluation after step 2; the last .*-1'"
    ):
        trainer.train()


def test_last_good_checkpoint_has_finite_weights(tmp_path, make_trainer):
    trainer = make_trainer("sft", max_steps=4)
    trainer.train()
    run = tmp_path / "run"
    assert last_good_checkpoint(run, 5) == run / "checkpoint-4"
    path = run / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    weights["ctm.queries"][0] = float("inf")
    save_file(weights, path)
    assert last_good_checkpoint(run, 5) == run / "checkpoint-3"
    (run / "checkpoint-3" / "model.safetensors").write_bytes(b"cut off")
    assert last_good_checkpoint(run, 5) == run / "checkpoint-2"
    assert last_good_checkpoint(run, 1) is None


@pytest.mark.parametrize("stage", STAGES)
def test_command_reports_divergence_in_one_sentence_and_saves_no_model(stage, tmp_path, capsys):
    argv = ["train", stage, "--config", f"nano_{stage.replace('-', '_')}", "--learning_rate", "1e3"]
    argv += [
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "6",
        "--train_samples",
        "16",
        "--logging_steps",
        "1",
    ]
    argv += ["--per_device_train_batch_size", "8", "--eval_strategy", "no", "--save_steps", "100"]
    assert cli.main(argv) == 2
    output = capsys.readouterr()
    *_, error = output.err.splitlines()
    assert error.startswith(
        "conceptseg train: the training diverged: the loss is nan in step 2; no checkpoint was "
    )
    assert "'loss': '0'" not in output.out
    assert not list(tmp_path.glob("**/*.safetensors"))


# -- JSON --


def test_trainer_state_is_valid_json(make_trainer, tmp_path):
    """NaN metrics are removed from the state, but still reported to the trackers."""
    best = {"metric_for_best_model": "mine", "load_best_model_at_end": True}
    trainer = make_trainer("sft", max_steps=2, eval_strategy="steps", eval_steps=1, **best)
    trainer.compute_metrics = lambda prediction: {"mine": NAN, "other": 1.5}
    logged = []
    trainer.add_callback(RecordLogs(logged))
    trainer.train()
    assert "eval_mine" in logged[0] and logged[0]["eval_mine"] != logged[0]["eval_mine"]
    text = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text()
    history = json.loads(text, parse_constant=reject_constant)["log_history"]
    evaluations = [entry for entry in history if "eval_other" in entry]
    assert len(evaluations) == 2 and not any("eval_mine" in entry for entry in evaluations)


class RecordLogs(TrainerCallback):
    def __init__(self, logged: list) -> None:
        self.logged = logged

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_other" in logs:
            self.logged.append(dict(logs))


def test_nonfinite_log_entries_of_a_resumed_run_are_removed():
    state = TrainerState(log_history=[{"loss": NAN, "step": 1}, {"loss": 0.5, "step": 2, "name": "x"}])
    FiniteLogs().on_train_begin(None, state, None)
    assert state.log_history == [{"step": 1}, {"loss": 0.5, "step": 2, "name": "x"}]


# -- nano --


def test_nano_loop_saves_no_nonfinite_weights(tmp_path):
    class Stage:
        name = "small"
        module = torch.nn.Linear(2, 1)

        def loss(self, step):
            loss = self.module(torch.ones(1, 2)).sum()
            if step == 5:
                loss.register_hook(lambda gradient: gradient * NAN)
            return loss, {"loss": loss.item()}

        def evaluate(self):
            return {}

    stage, schedule = Stage(), Schedule(steps=6, learning_rate=0.1, save_every=2)
    state = tmp_path / "small" / "state.safetensors"
    message = r"weight is not finite at step 6; lower the learning rate; '.*' has the state of step 4\.$"
    with pytest.raises(FloatingPointError, match=message):
        train(stage, schedule, tmp_path, report=lambda line: None)
    resumed = SimpleNamespace(module=torch.nn.Linear(2, 1))
    assert TrainingState(resumed.module, schedule, state).step == 4
