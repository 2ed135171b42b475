"""From the authors' checkpoint and SAM 3 to one folder that Auto classes load, and back."""

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
    """A conversion that is settled, but not done.

    Attributes:
        plan: Which tensor becomes which.
        config: Our configuration.
        folder: The checkpoint's folder.
        weights: Its tensors.
        sam: SAM 3.
    """

    plan: Plan
    config: ConceptSegConfig
    folder: Path
    weights: SafetensorsSource
    sam: SamWeights


def plan_conversion(checkpoint: str | os.PathLike, sam: str | os.PathLike) -> Conversion:
    """Settles a conversion from configurations and file headers; reads no weights.

    Args:
        checkpoint: Folder or hub id of a checkpoint in the authors' layout.
        sam: Folder or hub id of SAM 3 in Transformers' layout, Meta's `sam3.pt`, a folder with it, or one of
            our checkpoints.

    Raises:
        ConversionError: If one of them cannot be read or is something else.
    """
    folder = find_folder(checkpoint, "checkpoint")
    content = read_json(folder / "config.json")
    weights = SafetensorsSource(folder)
    sam_weights = read_sam(sam)
    config = original.read_config(content, weights.tensors, sam_weights.config, str(checkpoint))
    expected, tied = expected_tensors(config)
    plan = make_plan(
        [(weights, _from_original), (sam_weights.source, _prefixed(sam_weights.rename))],
        expected,
        # The VLM as it was released; what is small and decides the mask, in full precision.
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
    """Writes a checkpoint of the authors and SAM 3 as one folder that `AutoModel` and `AutoProcessor` load.

    The VLM keeps its number format; the CTM and SAM 3 are float32. Weights stream: no more than one shard is
    in memory. The folder appears when it is complete. Config and processor in it have the settings of a profile.

    Args:
        checkpoint: As in `plan_conversion`.
        sam: As in `plan_conversion`.
        out: The folder to make.
        allow_mismatch: Leave out what does not fit, instead of refusing it.
        shard_bytes: Size of a shard.
        profile: `"released"` or `"paper"`; see `profiles`. None: the settings that `to_original` has kept in the
            checkpoint, else `"released"`.
        prompt_template: The VLM's instruction, instead of the profile's.

    Returns:
        The folder.

    Raises:
        ConversionError: If something does not fit; nothing is left behind then.
        ValueError: If no profile has that name.
    """
    out = Path(out)
    check_free(out)
    if profile is not None:
        get_profile(profile)
    found = plan_conversion(checkpoint, sam)
    plan, config, folder = found.plan, found.config, found.folder
    _check(
        plan, f"checkpoint {str(checkpoint)!r} and SAM 3 {str(sam)!r} do not fit the model", allow_mismatch
    )
    settings = _settle_settings(config, folder, profile)
    if prompt_template is not None:
        settings["prompt_template"] = prompt_template.to_dict()
    processor = processors.join_processors(folder, found.sam.path, config, settings)
    config.architectures = ["ConceptSegForSegmentation"]
    config.dtype = _vlm_dtype(plan)
    config.sam_name_or_path = os.fspath(sam) if hub.is_hub_id(os.fspath(sam)) else None
    with new_folder(out, plan.nbytes) as target:
        hashes = {
            "checkpoint": _describe_source(checkpoint, folder, found.weights, plan),
            "sam": _describe_source(sam, found.sam.path, found.sam.source, plan),
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
    """Writes the VLM and the CTM of a checkpoint of ours in the authors' layout, for their code.

    SAM 3 is no part of that layout. What has no place in it (settings of our processor and router) is kept in
    config.json, where `convert` finds it; their code passes it by.

    Args:
        checkpoint: Folder or hub id of a checkpoint of ours.
        out: The folder to make.
        allow_mismatch: Leave out what does not fit, instead of refusing it.
        shard_bytes: Size of a shard.

    Returns:
        The folder.

    Raises:
        ConversionError: If it is no complete checkpoint of ours; nothing is left behind then.
    """
    out = Path(out)
    check_free(out)
    folder = find_folder(checkpoint, "checkpoint")
    content = read_json(folder / "config.json")
    if content.get("model_type") != ConceptSegConfig.model_type:
        raise ConversionError(
            f"checkpoint {str(checkpoint)!r} is of the type {content.get('model_type')!r}; --to-original takes a "
            f"checkpoint of ours ({ConceptSegConfig.model_type!r})."
        )
    config = ConceptSegConfig.from_pretrained(folder)
    weights = SafetensorsSource(folder)
    expected, tied = expected_tensors(config)
    plan = make_plan(
        [(weights, _own_name)],
        {name: shape for name, shape in expected.items() if not name.startswith("sam.")},
        lambda name, dtype: dtype,
        rename_target=lambda name: names.to_original(name) or name,
        tied=tied,
    )
    _check(plan, f"checkpoint {str(checkpoint)!r} does not fit its config.json", allow_mismatch)
    with new_folder(out, plan.nbytes) as target:
        hashes = {"checkpoint": _describe_source(checkpoint, folder, weights, plan)}
        files = write_shards(plan.steps, target, shard_bytes)
        settings = processors.save_original_processor(folder, target)
        dtype = str(_vlm_dtype(plan, original_names=True)).removeprefix("torch.")
        write_json(target / "config.json", original.write_config(config, dtype, settings))
        _write_manifest(target, hashes, files, plan)
    return out


def _settle_settings(config: ConceptSegConfig, folder: Path, profile: str | None) -> dict[str, Any]:
    """Gives a config the settings of a profile, and returns the processor's; both may be kept in the checkpoint."""
    kept = read_json(folder / "config.json").get(original.EXTRA_KEY)
    settings = dict((kept or {}).get("processor") or {})
    if profile is None and kept:
        return processors.RELEASED_SETTINGS | settings
    profile = profile or "released"
    for name, value in get_profile(profile).config.items():
        setattr(config, name, value)
    config.profile = profile
    own = {name: value for name, value in settings.items() if name not in get_profile(profile).processor}
    if (template := settings.get("prompt_template")) is not None and _is_own_template(template):
        own["prompt_template"] = template
    return processors.released_settings(profile) | own


def _is_own_template(template: Any) -> bool:
    try:
        return find_template_profile(PromptTemplate.from_dict(template)) is None
    except (ValueError, TypeError):
        return True  # the processor says what is wrong


def _from_original(name: str) -> tuple[Piece, ...] | None:
    ours = names.from_original(name)
    return None if ours is None else (Piece(ours),)


def _own_name(name: str) -> tuple[Piece, ...] | None:
    """Our tensors by their names in `state_dict()`, however the VLM's were saved."""
    if name.startswith("sam."):
        return ()
    theirs = names.to_original(name)
    return None if theirs is None else _from_original(theirs)


def _prefixed(rename: Rename) -> Rename:
    def renamed(name: str) -> tuple[Piece, ...] | None:
        pieces = rename(name)
        return None if pieces is None else tuple(p._replace(target=f"sam.{p.target}") for p in pieces)

    return renamed


def _check(plan: Plan, fault: str, allow_mismatch: bool) -> None:
    if not plan.fits and not allow_mismatch:
        raise ConversionError(
            f"{fault}: {plan.mismatches()}; get the complete files, or leave out what does not fit with "
            "--allow-mismatch."
        )
    for source, name, other in plan.tied:
        if not torch.equal(source.read(name), source.read(other)):
            raise ConversionError(
                f"tensor {name!r} differs from {other!r}, to which config.json ties it; correct "
                "tie_word_embeddings there."
            )


def _vlm_dtype(plan: Plan, original_names: bool = False) -> torch.dtype:
    """The format of most of the VLM's numbers."""
    sizes: dict[torch.dtype, int] = {}
    for step in plan.steps:
        if step.target.startswith("vlm.") or (original_names and step.piece.target.startswith("vlm.")):
            sizes[step.dtype] = sizes.get(step.dtype, 0) + step.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def _describe_source(
    given: str | os.PathLike, path: Path, source: WeightSource, plan: Plan
) -> dict[str, Any]:
    """What a manifest says of a source: its name (no path of this machine) and the hashes of the files it gave."""
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
            "files": describe_files(files, "hashing what was written"),
            "tensors": len(plan.steps),
            "missing": plan.missing,
            "unexpected": plan.unexpected,
            "misshapen": [name for name, _, _ in plan.misshapen],
            "ignored": len(plan.ignored),
        },
    )
