"""Conversion of the authors' checkpoint and SAM 3 to one folder for Auto classes, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..configuration_conceptseg import ConceptSegConfig
from ..profiles import find_template_profile, get_profile
from ..prompt_template import PromptTemplate
from ..vlm_families.qwen2_5_vl import Qwen2_5VlFamily
from . import names, original, processors
from .errors import ConversionError
from .plan import Plan, Rename, expected_tensors, make_plan
from .sam3 import Piece
from .sam_weights import SamWeights, read_sam
from .sources import (
    SafetensorsSource,
    WeightSource,
    describe_files,
    find_folder,
    read_json,
)
from .writer import SHARD_BYTES, check_free, new_folder, write_json, write_shards

MANIFEST_NAME = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Attributes:
        plan: Mapping of source tensors to target tensors.
        config: Configuration of the converted model.
        folder: Folder of the authors' checkpoint.
        weights: Tensors of the authors' checkpoint.
        sam: Weights and configuration of SAM 3.
    """

    plan: Plan
    config: ConceptSegConfig
    folder: Path
    weights: SafetensorsSource
    sam: SamWeights


def plan_conversion(checkpoint: str | os.PathLike, sam: str | os.PathLike) -> Conversion:
    """Plan a conversion from configurations and file headers, without reading weights.

    Args:
        checkpoint: Folder or hub id of a checkpoint in the authors' layout.
        sam: Folder or hub id of SAM 3 in Transformers' layout, Meta's `sam3.pt`, a folder that contains it, or a
            converted checkpoint.

    Raises:
        ConversionError: If one of them cannot be read or has another format.
    """
    folder = find_folder(checkpoint, "checkpoint")
    content = read_json(folder / "config.json")
    weights = SafetensorsSource(folder)
    sam_weights = read_sam(sam)
    config = original.read_config(content, weights.tensors, sam_weights.config, str(checkpoint))
    expected, tied = expected_tensors(config)
    plan = make_plan(
        [(weights, _from_original), (sam_weights.source, _add_prefix(sam_weights.rename))],
        expected,
        # The VLM keeps its dtype. CTM and SAM 3 are small, determine the mask and are stored in float32.
        lambda name, dtype: dtype if name.startswith("vlm.") else torch.float32,
        tied=tied,
    )
    return Conversion(plan, config, folder, weights, sam_weights)


def convert(
    checkpoint: str | os.PathLike,
    sam: str | os.PathLike,
    out: str | os.PathLike,
    *,
    allow_mismatch: bool = False,
    shard_bytes: int = SHARD_BYTES,
    profile: str | None = None,
    prompt_template: PromptTemplate | None = None,
) -> Path:
    """Convert the authors' checkpoint and SAM 3 to one folder for `AutoModel` and `AutoProcessor`.

    The VLM keeps its dtype; the CTM and SAM 3 are stored in float32. At most one shard is kept in memory. The output
    folder is created only when it is complete. Its config and processor have the settings of a profile.

    Args:
        checkpoint: See `plan_conversion`.
        sam: See `plan_conversion`.
        out: Output folder.
        allow_mismatch: Skip mismatched tensors instead of raising an error.
        shard_bytes: Maximum size of a shard in bytes.
        profile: `"released"` or `"paper"`; see `profiles`. With None, the settings that `to_original` has stored in
            the checkpoint, else `"released"`.
        prompt_template: Prompt template of the VLM, which overrides that of the profile.

    Returns:
        The output folder.

    Raises:
        ConversionError: If tensors do not match the model; no output is left in this case.
        ValueError: If the profile is unknown.
    """
    out = Path(out)
    check_free(out)
    if profile is not None:
        get_profile(profile)
    conversion = plan_conversion(checkpoint, sam)
    plan, config, folder = conversion.plan, conversion.config, conversion.folder
    _check(
        plan, f"checkpoint {str(checkpoint)!r} and SAM 3 {str(sam)!r} do not match the model", allow_mismatch
    )
    settings = _resolve_settings(config, folder, profile)
    if prompt_template is not None:
        settings["prompt_template"] = prompt_template.to_dict()
    processor = processors.join_processors(folder, conversion.sam.path, config, settings)
    config.architectures = ["ConceptSegForSegmentation"]
    config.dtype = _vlm_dtype(plan)
    config.sam_name_or_path = os.fspath(sam) if hub.is_hub_id(os.fspath(sam)) else None
    with new_folder(out, plan.nbytes) as target:
        hashes = {
            "checkpoint": _describe_source(checkpoint, folder, conversion.weights, plan),
            "sam": _describe_source(sam, conversion.sam.path, conversion.sam.source, plan),
        }
        files = write_shards(plan.steps, target, shard_bytes)
        config.save_pretrained(target)
        processor.save_pretrained(target)
        hub.save_model_card(target, config, [os.fspath(checkpoint), os.fspath(sam)])
        processors.copy_generation_config(folder, target)
        _write_manifest(target, hashes, files, plan)
    return out


def to_original(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    allow_mismatch: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Convert the VLM and the CTM of a converted checkpoint back to the authors' layout.

    SAM 3 is not part of that layout. Settings that the layout does not support (those of our processor and router) are
    stored in config.json under a separate key, which `convert` reads and the authors' code ignores.

    Args:
        checkpoint: Folder or hub id of a converted checkpoint.
        out: Output folder.
        allow_mismatch: Skip mismatched tensors instead of raising an error.
        shard_bytes: Maximum size of a shard in bytes.

    Returns:
        The output folder.

    Raises:
        ConversionError: If it is not a complete converted checkpoint; no output is left in this case.
    """
    out = Path(out)
    check_free(out)
    folder = find_folder(checkpoint, "checkpoint")
    content = read_json(folder / "config.json")
    if content.get("model_type") != ConceptSegConfig.model_type:
        raise ConversionError(
            f"checkpoint {str(checkpoint)!r} has model_type {content.get('model_type')!r}; --to-original requires a "
            f"converted checkpoint (model_type {ConceptSegConfig.model_type!r})."
        )
    config = ConceptSegConfig.from_pretrained(folder)
    if config.vlm_config.model_type != Qwen2_5VlFamily.model_type:
        raise ConversionError(
            f"checkpoint {str(checkpoint)!r} has a VLM of the family {config.vlm_config.model_type!r}; --to-original "
            f"requires {Qwen2_5VlFamily.model_type!r}, the only family of the authors' code."
        )
    weights = SafetensorsSource(folder)
    expected, tied = expected_tensors(config)
    plan = make_plan(
        [(weights, _canonical_name)],
        {name: shape for name, shape in expected.items() if not name.startswith("sam.")},
        lambda name, dtype: dtype,
        rename_target=lambda name: names.to_original(name) or name,
        tied=tied,
    )
    _check(plan, f"checkpoint {str(checkpoint)!r} does not match its config.json", allow_mismatch)
    with new_folder(out, plan.nbytes) as target:
        hashes = {"checkpoint": _describe_source(checkpoint, folder, weights, plan)}
        files = write_shards(plan.steps, target, shard_bytes)
        settings = processors.save_original_processor(folder, target)
        dtype = str(_vlm_dtype(plan, original_names=True)).removeprefix("torch.")
        write_json(target / "config.json", original.write_config(config, dtype, settings))
        _write_manifest(target, hashes, files, plan)
    return out


def _resolve_settings(config: ConceptSegConfig, folder: Path, profile: str | None) -> dict[str, Any]:
    """Apply a profile, or the settings stored in the checkpoint, to the config and return the processor settings."""
    stored = read_json(folder / "config.json").get(original.EXTRA_KEY)
    settings = dict((stored or {}).get("processor") or {})
    if profile is None and stored:
        return processors.RELEASED_SETTINGS | settings
    profile = profile or "released"
    for name, value in get_profile(profile).config.items():
        setattr(config, name, value)
    config.profile = profile
    kept = {name: value for name, value in settings.items() if name not in get_profile(profile).processor}
    if (template := settings.get("prompt_template")) is not None and _is_custom_template(template):
        kept["prompt_template"] = template
    return processors.released_settings(profile) | kept


def _is_custom_template(template: Any) -> bool:
    try:
        return find_template_profile(PromptTemplate.from_dict(template)) is None
    except (ValueError, TypeError):
        return True  # an invalid template, which the processor reports


def _from_original(name: str) -> tuple[Piece, ...] | None:
    ours = names.from_original(name)
    return None if ours is None else (Piece(ours),)


def _canonical_name(name: str) -> tuple[Piece, ...] | None:
    """Map a tensor name of a converted checkpoint, also in the VLM's original format, to its `state_dict()` name."""
    if name.startswith("sam."):
        return ()
    original_name = names.to_original(name)
    return None if original_name is None else _from_original(original_name)


def _add_prefix(rename: Rename) -> Rename:
    def renamed(name: str) -> tuple[Piece, ...] | None:
        pieces = rename(name)
        return None if pieces is None else tuple(p._replace(target=f"sam.{p.target}") for p in pieces)

    return renamed


def _check(plan: Plan, fault: str, allow_mismatch: bool) -> None:
    if not plan.fits and not allow_mismatch:
        raise ConversionError(
            f"{fault}: {plan.mismatches()}; download the complete files, or skip mismatched tensors with "
            "--allow-mismatch."
        )
    for source, name, other in plan.tied:
        if not torch.equal(source.read(name), source.read(other)):
            raise ConversionError(
                f"tensor {name!r} differs from {other!r}, although config.json ties them; correct "
                "tie_word_embeddings in config.json."
            )


def _vlm_dtype(plan: Plan, original_names: bool = False) -> torch.dtype:
    """Return the dtype with the most bytes among the VLM's tensors."""
    sizes: dict[torch.dtype, int] = {}
    for step in plan.steps:
        if step.target.startswith("vlm.") or (original_names and step.piece.target.startswith("vlm.")):
            sizes[step.dtype] = sizes.get(step.dtype, 0) + step.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def _describe_source(
    given: str | os.PathLike, path: Path, source: WeightSource, plan: Plan
) -> dict[str, Any]:
    """Describe a source for the manifest: its name, without local paths, and the hashes of the files that were read."""
    files = {source.tensors[step.name].file for step in plan.steps if step.source is source}
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        files.add(config)
    name = path.name if Path(given).exists() else os.fspath(given)
    return {"name": name, "files": describe_files(files, f"hashing {name}")}


def _write_manifest(target: Path, sources: Mapping[str, Any], files: list[Path], plan: Plan) -> None:
    import conceptseg_hf

    write_json(
        target / MANIFEST_NAME,
        {
            "converter": f"conceptseg-hf {conceptseg_hf.__version__}",
            "sources": sources,
            "files": describe_files(files, "hashing output"),
            "tensors": len(plan.steps),
            "missing": plan.missing,
            "unexpected": plan.unexpected,
            "misshapen": [name for name, _, _ in plan.misshapen],
            "ignored": len(plan.ignored),
        },
    )
