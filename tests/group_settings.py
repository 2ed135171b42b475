"""Settings of GRPO trainers in tests: groups of 4, one group per step, two steps on the CPU, and no files."""

from __future__ import annotations

from typing import Any

GROUP_SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-5,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "log_examples": 0,
}
