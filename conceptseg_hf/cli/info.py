"""`conceptseg info`: versions, devices and what a checkpoint holds; what a bug report needs."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import as_bad_input, check_model

_PACKAGES = ("conceptseg-hf", "torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")


def add_parser(verbs: Any) -> None:
    """Adds the verb to the command."""
    parser = verbs.add_parser("info", help="show versions, devices and what a checkpoint holds")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="checkpoint folder or hub id (default: the embedded nano checkpoint)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    check_model(arguments.model)
    import torch

    from conceptseg_hf.evaluation.loading import default_device, find_checkpoint

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    rows = {"python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: installed(name) for name in _PACKAGES}
    rows["device"] = str(default_device()) + (
        f" ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else ""
    )
    rows |= as_bad_input(_describe, as_bad_input(find_checkpoint, arguments.model))
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _describe(checkpoint: str) -> dict[str, str]:
    """What the config says, and the parameters of each part (counted without loading weights)."""
    import torch

    from conceptseg_hf import ConceptSegForSegmentation
    from conceptseg_hf.evaluation.loading import load_config

    config = load_config(checkpoint)
    with torch.device("meta"):
        model = ConceptSegForSegmentation(config)
    rows = {"model": checkpoint}
    for part, kind in (
        ("vlm", config.vlm_config.model_type),
        ("ctm", "concept translation module"),
        ("sam", config.sam_config.model_type),
    ):
        count = sum(parameter.numel() for parameter in getattr(model, part).parameters())
        rows[f"  {part}"] = f"{count / 1e6:,.2f} M parameters ({kind})"
    rows["  queries"] = (
        f"{config.ctm_config.num_queries} concept tokens, hidden states at {config.hidden_states_at!r}"
    )
    rows["  router"] = f"threshold {config.router_base} for one word, doubling with each further word"
    return rows
