"""Where that lies which is shipped beside the code: recipes, launch files, examples, the FiftyOne plugin."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_shipped_folder(name: str, package: str = "conceptseg_hf") -> Path | None:
    """A folder that a wheel has inside of a package, and the repository beside it.

    Args:
        name: The folder: "examples" and "fiftyone_plugin"; of conceptseg_trainers "recipes" and "accelerate_configs".
        package: The package, which is not imported.

    Returns:
        None if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    inside = Path(spec.submodule_search_locations[0]) / name
    return inside if inside.is_dir() else inside.parents[1] / name
