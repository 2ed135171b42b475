"""Register the checkpoints in FiftyOne's model zoo."""

from __future__ import annotations

import shutil
from pathlib import Path

import fiftyone as fo

SOURCE = Path(__file__).with_name("zoo")
"""Model source in the format of FiftyOne's zoo: manifest.json and a module with the required functions."""


def install_zoo_models() -> Path:
    """Copy the model source to FiftyOne's zoo, which registers "conceptseg-nano" and "conceptseg-r1-7b".

    `foz.load_zoo_model` then finds both models without downloading the source.

    Returns:
        The folder in `fo.config.model_zoo_dir` to which the source was copied.
    """
    folder = Path(fo.config.model_zoo_dir, "conceptseg")
    return Path(
        shutil.copytree(SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    )
