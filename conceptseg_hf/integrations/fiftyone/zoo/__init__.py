"""A source of FiftyOne's model zoo: FiftyOne copies this folder, or an archive of it, and calls the functions below.

The code lives in the package, so imports are absolute here and nothing is imported before a function needs it.
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
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickles


def download_model(model_name: str, model_path: str) -> None:
    """Makes the folder of a model, unless it is there: FiftyOne takes no folder for a download and asks every time.

    Raises:
        ValueError: If what would be downloaded is not in the format of this package.
    """
    folder = Path(model_path)
    if model_name == _EMBEDDED:  # its weights came with the package
        folder.mkdir(parents=True, exist_ok=True)
        return
    if (folder / _CONFIG).is_file():
        return
    from huggingface_hub import hf_hub_download, snapshot_download

    # Before gigabytes of weights that could not be used, and that would lie where the converted ones belong.
    config = Path(hf_hub_download(_HUB_IDS[model_name], _CONFIG))
    _check_format(model_name, config, folder)
    snapshot_download(_HUB_IDS[model_name], local_dir=folder, allow_patterns=_FILES, ignore_patterns=_CONFIG)
    shutil.copy(config, folder / _CONFIG)  # last: it says that the folder is complete


def load_model(model_name: str, model_path: str, **kwargs: Any) -> Any:
    """A `ConceptSegFiftyOneModel`.

    Args:
        model_name: Name in the manifest.
        model_path: Its folder.
        **kwargs: For `ConceptSegFiftyOneModel`, such as prompt, prompt_field, reference_field, router, output.
    """
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel

    if model_name != _EMBEDDED:
        _check_format(model_name, Path(model_path, _CONFIG), Path(model_path))
    return ConceptSegFiftyOneModel("nano" if model_name == _EMBEDDED else model_path, **kwargs)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """The model's part of the form of FiftyOne's operator "Apply zoo model"."""
    if importlib.util.find_spec("conceptseg_hf") is None:
        return _say_missing()
    from conceptseg_hf.integrations.fiftyone.zoo_form import zoo_form

    return zoo_form(ctx)


def parse_parameters(model_name: str, ctx: Any, params: dict[str, Any]) -> None:
    """Turns the form's values into arguments of `load_model`, in place."""
    from conceptseg_hf.integrations.fiftyone.zoo_form import zoo_arguments

    zoo_arguments(ctx, params)


def _say_missing() -> Any:
    from fiftyone.operators import types

    message = (
        "The package conceptseg_hf is not installed where this FiftyOne runs; install it there with: "
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
