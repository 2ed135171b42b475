"""Makes the checkpoints known to FiftyOne's model zoo."""

from __future__ import annotations

import shutil
from pathlib import Path

import fiftyone as fo

SOURCE = Path(__file__).with_name("zoo")
"""The folder that FiftyOne's zoo understands: manifest.json and three functions."""


def install_zoo_models() -> Path:
    """Lets `foz.load_zoo_model("conceptseg-nano")` and "conceptseg-r1-7b" find their models, without a network.

    Returns:
        The folder in `fo.config.model_zoo_dir` that now holds the source.
    """
    folder = Path(fo.config.model_zoo_dir, "conceptseg")
    return Path(
        shutil.copytree(SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    )
