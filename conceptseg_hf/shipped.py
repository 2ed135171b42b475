"""Folders that are shipped with the code: checkpoints, recipes, launch files, examples and the FiftyOne plugin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

CHECKPOINTS = {"nano": "make nano", "mini": "make mini", "coprs-nano": "make coprs-nano"}
"""Names of embedded checkpoints, and the commands that train them."""

_PREFIX = "conceptseg-"


def find_embedded_checkpoint(name: str) -> Path | None:
    """Return the folder of the embedded checkpoint with a name such as "mini" or "conceptseg-mini".

    Args:
        name: Name, folder or hub id of a checkpoint.

    Returns:
        The folder, or None if no embedded checkpoint has this name, or if a local checkpoint has this name.

    Raises:
        FileNotFoundError: If this installation does not contain the checkpoint.
    """
    short_name = name.removeprefix(_PREFIX)
    if short_name not in CHECKPOINTS or (Path(name) / "config.json").is_file():
        return None
    folder = Path(__file__).parent / "checkpoints" / short_name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded checkpoint {name!r} is not part of this installation; train it with "
            f"`{CHECKPOINTS[short_name]}`, or select another checkpoint."
        )
    return folder


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
