"""`conceptseg info`: versions, devices, contents of a checkpoint or a concept, and folders of recipes and examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BadInputError, as_bad_input, check_model, installed_version, load_model

if TYPE_CHECKING:
    from conceptseg_hf import ConceptPrompt

_SHIPPED = {
    "recipes": ("recipes", "conceptseg_trainers"),
    "launch files": ("accelerate_configs", "conceptseg_trainers"),
    "FiftyOne plugin": ("fiftyone_plugin",),
    "examples": ("examples",),
}
_PACKAGES = ("conceptseg-hf", "torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "info", help="show versions, devices and the contents of a checkpoint or a concept"
    )
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="PATH_OR_ID",
        help="name of an embedded checkpoint (nano, mini), folder or hub id (default: nano), or a concept file",
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="same as the positional argument; with a concept file: the checkpoint to compare its weights with",
    )
    parser.add_argument(
        "--hashes",
        action="store_true",
        help="compute the SHA-256 of the weight files and compare it with conversion.json",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    import platform

    if arguments.folder is not None and _is_concept(arguments.folder):
        return _show_concept(arguments)
    if arguments.folder is not None and arguments.model is not None:
        raise BadInputError("the checkpoint is given twice; omit --model.")
    checkpoint = arguments.folder or arguments.model
    check_model(checkpoint)
    import torch

    from conceptseg_hf.devices import default_device
    from conceptseg_hf.loading import find_checkpoint
    from conceptseg_hf.shipped import find_shipped_folder

    rows = {"python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: installed_version(name) for name in _PACKAGES}
    rows["device"] = str(default_device()) + (
        f" ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else ""
    )
    checkpoint = as_bad_input(find_checkpoint, checkpoint)
    rows |= as_bad_input(_describe, checkpoint)
    rows |= as_bad_input(_describe_files, checkpoint, arguments.hashes)
    rows |= {what: str(find_shipped_folder(*where) or "not installed") for what, where in _SHIPPED.items()}
    _print_rows(rows)
    return 0


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _is_concept(name: str) -> bool:
    """Whether a name is a file, or would be a concept file if it existed."""
    try:
        return name.endswith(".safetensors") or (not Path(name).is_dir() and Path(name).exists())
    except (OSError, ValueError):  # too long, or contains a null byte
        return False


def _show_concept(arguments: argparse.Namespace) -> int:
    """Print a concept, and whether it belongs to a checkpoint."""
    check_model(arguments.model)
    from conceptseg_hf.concept_prompt import as_concept, concept_hash

    concept = as_bad_input(as_concept, arguments.folder)
    arguments.device, arguments.dtype, arguments.vlm_engine = "cpu", "auto", "transformers"
    model, _ = load_model(arguments)
    checkpoint = str(model.config.name_or_path)
    belongs = "those" if concept.model_hash == concept_hash(model) else "not those"
    rows = _describe_concept(concept)
    rows["weights"] = f"{concept.model_hash} ({belongs} of {checkpoint})" if concept.model_hash else "any"
    _print_rows(rows)
    print(_printable(concept.summary()))
    return 0


def _describe_concept(concept: ConceptPrompt) -> dict[str, str]:
    rows = {"prompt": concept.prompt}
    rows |= {f"phrase {number}": phrase for number, phrase in enumerate(concept.phrases)}
    rows["rule"] = "none" if concept.rule is None else concept.rule
    tokens = concept.concept_embeds
    rows["tokens"] = "none" if tokens is None else f"{tokens.shape[0]} of width {tokens.shape[1]}"
    rows["threshold"] = f"{concept.threshold:.3f}"
    rows["score"] = "not verified" if concept.score is None else f"{concept.score:.3f}"
    if concept.reasoning_score is not None:
        rows["  of reasoning"] = f"{concept.reasoning_score:.3f}"
    for row in concept.scores:
        values = ", ".join(f"{value:.2f}" for value in row.per_reference)
        rows[f"  {_printable(row.name)}"] = f"{row.score:.3f} (per reference: {values})"
    return {name: _printable(value) for name, value in rows.items()}


def _printable(text: str) -> str:
    """Escape line breaks and control characters, which a file from elsewhere may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _describe(checkpoint: str) -> dict[str, str]:
    """Describe the config and the number of parameters of each part, without loading weights."""
    import torch

    from conceptseg_hf import ConceptSegForSegmentation
    from conceptseg_hf.loading import load_config

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
    rows["  preset"] = _preset_of(config) or "none"
    if config.profile is not None:
        rows["  profile"] = config.profile
    rows["  router"] = f"threshold {config.router_base} for one word, doubled for each additional word"
    return rows


def _preset_of(config: Any) -> str | None:
    """Return the name of the preset with the same VLM sizes."""
    from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
    from conceptseg_hf.presets import PRESETS

    def sizes(config: Any) -> tuple[int, ...]:
        text, vision = config.get_text_config(), config.vlm_config.vision_config
        return text.hidden_size, text.num_hidden_layers, text.vocab_size, vision.hidden_size, vision.depth

    return next(
        (name for name in PRESETS if sizes(ConceptSegConfig.from_preset(name)) == sizes(config)), None
    )


def _describe_files(checkpoint: str, hashes: bool) -> dict[str, str]:
    """Describe local weight files from their headers."""
    from collections import defaultdict

    from conceptseg_hf.conversion import MANIFEST_NAME
    from conceptseg_hf.conversion.sources import SafetensorsSource, describe_files, read_json

    folder = Path(checkpoint)
    if not any(folder.glob("*.safetensors")):
        return {}  # a hub id, or a folder without weights
    weights = SafetensorsSource(folder)
    sizes: dict[str, int] = defaultdict(int)
    formats: dict[str, set[str]] = defaultdict(set)
    for name, info in weights.tensors.items():
        part = name.split(".")[0]
        sizes[part] += info.nbytes
        formats[part].add(str(info.dtype).removeprefix("torch."))
    rows = {
        f"  {part} on disk": f"{sizes[part] / 1e6:,.2f} MB, {', '.join(sorted(formats[part]))}"
        for part in sizes
    }
    rows["  files"] = ", ".join(file.name for file in weights.files)
    manifest = read_json(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else {}
    for role, source in manifest.get("sources", {}).items():
        rows[f"  {role} from"] = str(source["name"])
        rows |= {f"    {role}: {name}": f"sha256 {file['sha256']}" for name, file in source["files"].items()}
    if hashes:
        recorded = manifest.get("files", {})
        for name, file in describe_files(weights.files, "hashing").items():
            expected = recorded.get(name, {}).get("sha256")
            remark = (
                ""
                if expected is None
                else ", unchanged since conversion"
                if expected == file["sha256"]
                else ", CHANGED since conversion"
            )
            rows[f"  {name}"] = f"sha256 {file['sha256']}{remark}"
    return rows
