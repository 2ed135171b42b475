"""Opt-in remote-code stub: lets a checkpoint load with `trust_remote_code=True` and no import beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path

STUB_NAME = "conceptseg_stub"

_STUB = '''"""Points Transformers at the installed package `conceptseg-hf`; holds no code of its own."""

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor  # noqa: F401
'''
# No `custom_pipelines`: with it even `pipeline("concept-segmentation", model=folder)` after an import would
# demand trust_remote_code.
_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": f"{STUB_NAME}.ConceptSegConfig",
        "AutoModel": f"{STUB_NAME}.ConceptSegForSegmentation",
    },
    "processor_config.json": {"AutoProcessor": f"{STUB_NAME}.ConceptSegProcessor"},
}


def save_remote_stub(folder: str | os.PathLike) -> Path:
    """Adds the stub to a saved checkpoint; Auto classes then need only `trust_remote_code=True` to load it.

    The package itself must still be installed where the checkpoint is loaded. Where it is imported, nothing
    changes.

    Args:
        folder: A folder written by `model.save_pretrained` and `processor.save_pretrained`.

    Returns:
        The path of the stub.

    Raises:
        FileNotFoundError: If the folder holds no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"save_remote_stub: {str(folder)!r} holds no config.json; save the model there first."
        )
    for name, auto_map in _AUTO_MAPS.items():
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = auto_map
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stub = folder / f"{STUB_NAME}.py"
    stub.write_text(_STUB, encoding="utf-8")
    return stub
