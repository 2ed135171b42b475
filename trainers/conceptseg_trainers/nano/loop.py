"""The training loop of every nano stage: seeded, resumable, with an exponential moving average and a log.

A stage is a `Stage`: a module, its loss on the batch of a step, and its held-out numbers. Batches are
functions of the step alone, so that a resumed run sees what an uninterrupted one would have seen.
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
    """One stage of nano training.

    Attributes:
        name: Name of the stage and of its folder.
        module: Holds every parameter that trains.
    """

    name: str
    module: nn.Module

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss on the batch of a step, and numbers to log."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out numbers of the module as it stands."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Warm-up, a constant learning rate, and a linear decay to zero over the last part.

    Attributes:
        steps: Number of optimiser steps.
        learning_rate: The constant rate.
        warmup: Steps of linear warm-up.
        restart: A step at which other parameters begin to train: the rate warms up once more.
        decay: Share of the steps over which the rate falls to zero.
        weight_decay: AdamW's, on matrices only.
        evaluate_every: Steps between held-out evaluations.
        save_every: Steps between checkpoints.
        ema: Decay of the moving average that is evaluated and kept.
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
        """The learning rate at a step."""
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        since = step - self.restart if step >= self.restart else step
        return self.learning_rate * min(1.0, (since + 1) / self.warmup, max(0.0, remaining))


def train(
    stage: Stage, schedule: Schedule, run_dir: Path, report: Callable[[str], None] = print_line
) -> dict[str, float]:
    """Runs a stage to its end, from its last checkpoint if there is one; the module ends with the average.

    Args:
        stage: What to train.
        schedule: How long and how fast.
        run_dir: The stage keeps `<run_dir>/<name>/` with its state, its log (`log.jsonl`) and its final
            weights.
        report: Called with each line of held-out numbers.

    Returns:
        The final held-out numbers.

    Raises:
        FloatingPointError: If the loss or a weight is not finite.
        OSError: If the state cannot be written.
    """
    folder = run_dir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainingState(stage.module, schedule, folder / "state.safetensors")
    started, first = time.monotonic(), state.step
    if first < schedule.steps:
        progress = progress_bar(
            schedule.steps, "steps", stage.name, initial=first, mininterval=5, dynamic_ncols=True
        )
        stage.module.train()
        while state.step < schedule.steps:
            loss, numbers = stage.loss(state.step)
            if not torch.isfinite(loss):
                raise FloatingPointError(_diverged(stage, f"the loss is {loss.item()}", state))
            state.update(loss)
            progress.update()
            progress.set_postfix({key: f"{value:.3f}" for key, value in numbers.items()}, refresh=False)
            at_end = state.step == schedule.steps
            if state.step % schedule.save_every == 0 or at_end:
                if wrong := find_nonfinite(state.parameters.items()):
                    raise FloatingPointError(_diverged(stage, f"{wrong[0]} is not finite", state))
                state.save()
            if (state.step % schedule.evaluate_every == 0) and not at_end:
                with state.averaged():
                    held_out = stage.evaluate()
                stage.module.train()
                _log(folder, state.step, started, numbers, held_out)
                report(
                    f"{stage.name} {state.step}/{schedule.steps}: {_line(numbers)} | "
                    f"held out {_line(held_out)}"
                )
        progress.close()
    state.load_average()
    held_out = stage.evaluate()
    _log(folder, state.step, started, {}, held_out)
    report(f"{stage.name} ended: held out {_line(held_out)}")
    return held_out


class TrainingState:
    """Optimiser, moving average and step of one run, kept in one safetensors file."""

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
        """One optimiser step."""
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
        """A context in which the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            raw = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(raw)

    def load_average(self) -> None:
        """Puts the averaged weights into the module for good."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])

    def save(self) -> None:
        """Writes the state; a kill in the middle leaves the previous one."""
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is complete or not there.

    Raises:
        WriteError: If it cannot be written; an older one stays.
    """
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise write_error(
            path, error, "make room and run again, which goes on from the last state"
        ) from error


def _diverged(stage: Stage, what: str, state: TrainingState) -> str:
    kept = (
        f"{str(state.path)!r} has the state of step {state.saved}"
        if state.saved
        else "no state was saved before"
    )
    return f"stage {stage.name}: {what} at step {state.step}; lower the learning rate; {kept}."


def mean(values: Iterable[float]) -> float:
    """The mean of the values that are numbers; 0 when there is none."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else 0.0


def _line(numbers: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.3f}" for key, value in numbers.items())


def _log(
    folder: Path, step: int, started: float, numbers: dict[str, float], held_out: dict[str, float]
) -> None:
    row = {"step": step, "seconds": round(time.monotonic() - started), **numbers}
    row |= {f"held_out/{key}": value for key, value in held_out.items()}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json_text({key: round(value, 5) for key, value in row.items()}) + "\n")
