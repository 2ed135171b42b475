"""`conceptseg env`: the versions and hardware that a bug report needs."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from .arguments import installed_version

_PACKAGES = (
    *("conceptseg-hf", "torch", "torchvision", "transformers", "accelerate", "safetensors", "tokenizers"),
    *("huggingface-hub", "numpy", "pillow", "trl", "peft", "deepspeed", "datasets", "bitsandbytes", "vllm"),
    *("fiftyone", "gradio", "ray", "pyarrow", "scipy", "pysodmetrics"),
)
# Settings that change results or speed. Values of other variables, such as tokens, are not printed.
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF"),
    *("WORLD_SIZE", "TOKENIZERS_PARALLELISM"),
)


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "env",
        help="print what a bug report needs: versions and hardware",
        description="Prints the versions of the packages in use, the hardware and settings that affect results, as "
        "Markdown. It contains no paths, tokens or host names.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    import platform

    import torch

    import conceptseg_hf

    memory = _memory()
    rows = {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "memory": "unknown" if memory is None else f"{memory / 1e9:.1f} GB",
        "GPU": _accelerator(),
        "CUDA of torch": torch.version.cuda or "none",
        "embedded checkpoint": _checkpoint(conceptseg_hf.nano_checkpoint()),
    }
    rows |= {name: installed_version(name) for name in _PACKAGES}
    rows |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    sys.stdout.write("".join(f"- {name}: {value}\n" for name, value in rows.items()))
    return 0


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return "; ".join(f"{item.name}, {item.total_memory / 1e9:.0f} GB" for item in names)
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return "none"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _checkpoint(folder: Path) -> str:
    path = folder / "model.safetensors"
    return f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else "missing"
