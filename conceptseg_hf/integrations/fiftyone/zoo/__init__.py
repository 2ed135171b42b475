"""Source for FiftyOne's model zoo: FiftyOne copies this folder, or an archive of it, and calls the functions below.

The implementation is in the package, so this module uses absolute imports, inside the functions that need them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

_HUB_IDS = {"conceptseg-r1-7b": "zhaoyuan666/ConceptSeg-R1-7B"}
_EMBEDDED = "conceptseg-nano"
_CONFIG = "config.json"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickle files


def download_model(model_name: str, model_path: str) -> None:
    """Download a model to its folder unless it is complete; FiftyOne calls this whenever the model is loaded.

    Raises:
        ValueError: If the checkpoint on the hub is not in the format of this package.
    """
    folder = Path(model_path)
    if model_name == _EMBEDDED:  # its weights are included in the package
        folder.mkdir(parents=True, exist_ok=True)
        return
    if (folder / _CONFIG).is_file():
        return
    from huggingface_hub import hf_hub_download, snapshot_download

    # Check the format before downloading gigabytes of unusable weights to the folder of the converted checkpoint.
    config = Path(hf_hub_download(_HUB_IDS[model_name], _CONFIG))
    _check_format(model_name, config, folder)
    snapshot_download(_HUB_IDS[model_name], local_dir=folder, allow_patterns=_FILES, ignore_patterns=_CONFIG)
    shutil.copy(config, folder / _CONFIG)  # last, as it marks the folder as complete


def load_model(model_name: str, model_path: str, **kwargs: Any) -> Any:
    """Load a `ConceptSegFiftyOneModel`.

    Args:
        model_name: Name of the model in the manifest.
        model_path: Folder of the model.
        **kwargs: Arguments of `ConceptSegFiftyOneModel`, such as prompt, prompt_field, reference_field, router, output.
    """
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel

    if model_name != _EMBEDDED:
        _check_format(model_name, Path(model_path, _CONFIG), Path(model_path))
    return ConceptSegFiftyOneModel("nano" if model_name == _EMBEDDED else model_path, **kwargs)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """Return the model's inputs for the form of FiftyOne's operator "Apply zoo model"."""
    if importlib.util.find_spec("conceptseg_hf") is None:
        return _missing_package_form()
    from conceptseg_hf.integrations.fiftyone.zoo_form import zoo_form

    return zoo_form(ctx)


def parse_parameters(model_name: str, ctx: Any, params: dict[str, Any]) -> None:
    """Convert the form's values to arguments of `load_model`, in place."""
    from conceptseg_hf.integrations.fiftyone.zoo_form import zoo_arguments

    zoo_arguments(ctx, params)


def _missing_package_form() -> Any:
    from fiftyone.operators import types

    message = (
        "The package conceptseg_hf is not installed in FiftyOne's environment; install it with: "
        "pip install 'conceptseg-hf[fiftyone]'"
    )
    inputs = types.Object()
    inputs.view("fault", types.Warning(label=message), invalid=True, error_message=message)
    return types.Property(inputs, required=True)


def _check_format(model_name: str, config: Path, folder: Path) -> None:
    if (
        not config.is_file()
        or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "conceptseg"
    ):
        raise ValueError(
            f"model {model_name!r} is not in the format of conceptseg-hf; convert the released checkpoint with "
            f"`conceptseg convert --checkpoint {_HUB_IDS[model_name]} --sam facebook/sam3 --out {folder}`."
        )
