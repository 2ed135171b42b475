"""A source of FiftyOne's model zoo: FiftyOne copies this folder, or an archive of it, and calls the functions below.

The code lives in the package, so imports are absolute here and nothing is imported before a function needs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HUB_IDS = {"conceptseg-r1-7b": "zhaoyuan666/ConceptSeg-R1-7B"}
_EMBEDDED = "conceptseg-nano"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickles


def download_model(model_name: str, model_path: str) -> None:
    """Makes the folder of a model; FiftyOne calls this once.

    Raises:
        ValueError: If what was downloaded is not in the format of this package.
    """
    folder = Path(model_path)
    if model_name == _EMBEDDED:  # its weights came with the package
        folder.mkdir(parents=True, exist_ok=True)
        return
    from huggingface_hub import snapshot_download

    snapshot_download(_HUB_IDS[model_name], local_dir=folder, allow_patterns=_FILES)
    _check_format(model_name, folder)


def load_model(model_name: str, model_path: str, **kwargs: Any) -> Any:
    """A `ConceptSegFiftyOneModel`.

    Args:
        model_name: Name in the manifest.
        model_path: Its folder.
        **kwargs: For `ConceptSegFiftyOneModel`: prompt, references, router, output, heatmap, device.
    """
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel

    if model_name != _EMBEDDED:
        _check_format(model_name, Path(model_path))
    return ConceptSegFiftyOneModel("nano" if model_name == _EMBEDDED else model_path, **kwargs)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """The model's part of the form of the official "Apply zoo model" operator."""
    from fiftyone.operators import types

    inputs = types.Object()
    inputs.str("prompt", required=True, label="Prompt", description="The concept in words")
    inputs.enum("router", ["adaptive", "sam_only", "full_reasoning"], default="adaptive", label="Router")
    return types.Property(inputs)


def parse_parameters(model_name: str, ctx: Any, params: dict[str, Any]) -> None:
    """The form's values are arguments of `load_model` as they are."""


def _check_format(model_name: str, folder: Path) -> None:
    config = folder / "config.json"
    if (
        not config.is_file()
        or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "conceptseg"
    ):
        raise ValueError(
            f"model {model_name!r} in {str(folder)!r} is not in the format of conceptseg-hf; convert the released "
            f"checkpoint with `conceptseg convert --checkpoint ... --sam ... --out {folder}`."
        )
