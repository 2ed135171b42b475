"""The training loop of the stages: seeded, resumable, with an exponential moving average and a log.

A stage implements `Stage`: it has a module, computes the loss of a step, and evaluates the module. A batch depends only
on the step, so a resumed run is trained on the same batches as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptseg_hf.finite import find_nonfinite
from conceptseg_hf.progress import print_line, progress_bar
from conceptseg_hf.writing import json_text, write_error


class Stage(Protocol):
    """One stage of a training from scratch."""

    @property
    def name(self) -> str:
        """Name of the stage and of its folder."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module with all trained parameters."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss on the batch of a step, and metrics to log."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return metrics of the module on held-out samples."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a constant learning rate, and a linear decay to zero; and the other settings of the loop.

    Attributes:
        steps: Number of optimizer steps.
        learning_rate: Peak learning rate.
        warmup: Number of warm-up steps.
        restart: Step of a second warm-up, after which further parameters are trained.
        decay: Fraction of the steps over which the learning rate decays to zero.
        weight_decay: Weight decay of AdamW, for matrices only.
        evaluate_every: Number of steps between evaluations.
        save_every: Number of steps between saves of the state.
        ema: Decay of the moving average of the weights, which is evaluated and becomes the result.
    """

    steps: int
    learning_rate: float
    warmup: int = 150
    restart: int = 0
    decay: float = 0.25
    weight_decay: float = 0.02
    evaluate_every: int = 500
    save_every: int = 100
    ema: float = 0.998

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        warmup_step = step - self.restart if step >= self.restart else step
        return self.learning_rate * min(1.0, (warmup_step + 1) / self.warmup, max(0.0, remaining))


def train(
    stage: Stage, schedule: Schedule, run_dir: Path, report: Callable[[str], None] = print_line
) -> dict[str, float]:
    """Train a stage, resuming from its saved state if there is one; finally, the module has the averaged weights.

    Args:
        stage: The stage.
        schedule: The schedule.
        run_dir: Parent of the stage's folder `<run_dir>/<name>`, which contains its state (`state.safetensors`) and its
            log (`log.jsonl`).
        report: Function that prints a line of metrics.

    Returns:
        The metrics of the final evaluation.

    Raises:
        FloatingPointError: If the loss or a weight is not finite.
        OSError: If the state cannot be written.
        ValueError: If the saved state is that of another model.
    """
    folder = run_dir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainingState(stage.module, schedule, folder / "state.safetensors")
    start_time = time.monotonic()
    if state.step < schedule.steps:
        progress = progress_bar(
            schedule.steps, "steps", stage.name, initial=state.step, mininterval=5, dynamic_ncols=True
        )
        stage.module.train()
        while state.step < schedule.steps:
            loss, metrics = stage.loss(state.step)
            if not torch.isfinite(loss):
                raise FloatingPointError(_diverged(stage, f"the loss is {loss.item()}", state))
            state.update(loss)
            progress.update()
            progress.set_postfix({key: f"{value:.3f}" for key, value in metrics.items()}, refresh=False)
            at_end = state.step == schedule.steps
            if state.step % schedule.save_every == 0 or at_end:
                if nonfinite := find_nonfinite(state.parameters.items()):
                    raise FloatingPointError(_diverged(stage, f"{nonfinite[0]} is not finite", state))
                state.save()
            if (state.step % schedule.evaluate_every == 0) and not at_end:
                with state.averaged():
                    held_out = stage.evaluate()
                stage.module.train()
                _log(folder, state.step, start_time, metrics, held_out)
                report(
                    f"{stage.name} {state.step}/{schedule.steps}: {_line(metrics)} | "
                    f"held out: {_line(held_out)}"
                )
        progress.close()
    state.load_average()
    held_out = stage.evaluate()
    _log(folder, state.step, start_time, {}, held_out)
    report(f"{stage.name} finished | held out: {_line(held_out)}")
    return held_out


class TrainingState:
    """Weights, their moving average, the optimizer and the step of a run, saved in one safetensors file.

    Args:
        module: The module to train.
        schedule: The schedule.
        path: Path of the file; the state is loaded from it if it exists.

    Raises:
        ValueError: If the file has the state of another model.

    Attributes:
        step: Number of completed steps.
        saved: Number of completed steps of the saved state.
        parameters: The trained parameters by name.
        average: The moving averages of the parameters by name.
    """

    def __init__(self, module: nn.Module, schedule: Schedule, path: Path) -> None:
        self.module = module
        self.schedule = schedule
        self.path = path
        self.step = self.saved = 0
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for p in self.parameters.values() if p.dim() > 1],
                "weight_decay": schedule.weight_decay,
            },
            {"params": [p for p in self.parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.99), fused=True)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        if path.exists():
            self._load()

    def update(self, loss: Tensor) -> None:
        """Take one optimizer step."""
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(self.schedule.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.parameters.values()], weight
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Temporarily replace the weights of the module by their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            current = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(current)

    def load_average(self) -> None:
        """Replace the weights of the module by their averages."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])

    def save(self) -> None:
        """Save the state; an interruption does not damage the previous state."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors = {key: value.contiguous().cpu().clone() for key, value in tensors.items()}
        write_tensors(self.path, tensors, {"step": str(self.step)})
        self.saved = self.step

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            self.step = self.saved = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if any(shapes.get(f"weight/{name}") != p.shape for name, p in self.parameters.items()):
            raise ValueError(
                f"{str(self.path)!r} is the state of another model (another family of VLMs, or another version of the "
                "code); give another --run-dir, or delete the folder to train this stage again."
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"weight/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                moments = {
                    key: tensors[f"{key}/{name}"].to(p.device)
                    for key in ("exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in tensors
                }
                if moments:
                    self.optimizer.state[p] = {"step": tensors[f"step/{name}"], **moments}


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    temporary: Path | None = None,
) -> None:
    """Write a safetensors file under a temporary name, and rename it.

    Raises:
        WriteError: If it cannot be written; an existing file is not changed.
    """
    temporary = temporary or path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise write_error(
            path, error, "free some space and run the same command to resume from the last state"
        ) from error


def _diverged(stage: Stage, fault: str, state: TrainingState) -> str:
    saved = (
        f"{str(state.path)!r} has the state of step {state.saved}"
        if state.saved
        else "no state has been saved"
    )
    return f"stage {stage.name}: {fault} at step {state.step}; lower the learning rate; {saved}."


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values without NaN; 0 if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())


def _log(
    folder: Path, step: int, start_time: float, metrics: dict[str, float], held_out: dict[str, float]
) -> None:
    row = {"step": step, "seconds": round(time.monotonic() - start_time), **metrics}
    row |= {f"held_out/{key}": value for key, value in held_out.items()}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json_text({key: round(value, 5) for key, value in row.items()}) + "\n")
