"""Folders that are shipped with the code: recipes, launch files, examples and the FiftyOne plugin."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_shipped_folder(name: str, package: str = "conceptseg_hf") -> Path | None:
    """Return a shipped folder, which is inside the package in a wheel and next to it in the repository.

    Args:
        name: "examples" or "fiftyone_plugin"; for conceptseg_trainers, "recipes" or "accelerate_configs".
        package: Name of the package, which is not imported.

    Returns:
        The folder, or None if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    inside = Path(spec.submodule_search_locations[0]) / name
    return inside if inside.is_dir() else inside.parents[1] / name
