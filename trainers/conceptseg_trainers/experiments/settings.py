"""The settings of reinforcement learning that all arms of an experiment have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainSettings:
    """How an arm is trained.

    Attributes:
        steps: Number of optimizer steps.
        prompts: Number of prompts per step.
        num_generations: Number of completions per prompt (G).
        num_best_and_worst: See `MetaGRPOConfig`.
        batch_size: Number of completions per forward pass.
        learning_rate: Peak learning rate.
        beta: Weight of the KL to the start.
    """

    steps: int = 60
    prompts: int = 32
    num_generations: int = 16
    num_best_and_worst: int | None = 4
    batch_size: int = 128
    learning_rate: float = 5e-4
    beta: float = 0.0

    @property
    def completions(self) -> int:
        """Number of sampled completions."""
        return self.steps * self.prompts * self.num_generations


def describe(settings: TrainSettings) -> str:
    """Return the settings as one line for reports."""
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
