"""Combine the trained stages into one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.writing import json_text, write_file


def load_stages(
    preset: str,
    processor: ConceptSegProcessor,
    run_dir: Path,
    vlm_stage: str = "vlm",
    sam: Path | None = None,
) -> ConceptSegForSegmentation:
    """Return the model with the averaged weights of SAM 3 and the VLM and a new CTM.

    Args:
        preset: Name of the preset of its config.
        processor: Its processor.
        run_dir: Folder of the stages.
        vlm_stage: Name of the stage that trained the VLM: "vlm" or "base-referring".
        sam: Checkpoint whose SAM 3 is used instead of that of the stage "sam".

    Raises:
        FileNotFoundError: If one of the two stages has not been run.
        OSError, ValueError: If the SAM 3 of `sam` cannot be used; see `load_start`.
    """
    torch.manual_seed(0)
    # Concept tokens contain a box, so SAM 3 is trained without the token for "no box" after them.
    config = ConceptSegConfig.from_preset(preset, sam_geometry_cls_with_concepts=False)
    model = ConceptSegForSegmentation(config)
    if sam is None:
        load_average(model.sam, run_dir, "sam", "sam.")
    else:
        load_start(model.sam, sam, "sam")
    load_average(model.vlm, run_dir, vlm_stage, "vlm.")
    tokenizer = processor.tokenizer
    generation_config = model.vlm.generation_config
    generation_config.eos_token_id = tokenizer.eos_token_id
    generation_config.pad_token_id = tokenizer.pad_token_id
    generation_config.max_new_tokens = 96
    return model


def load_average(module: nn.Module, run_dir: Path, stage: str, prefix: str = "") -> None:
    """Load the averaged weights of a stage into a module.

    Args:
        module: The module.
        run_dir: Folder of the stages.
        stage: Name of the stage.
        prefix: Prefix of the names of the module's parameters in the stage, for instance "vlm.".

    Raises:
        FileNotFoundError: If the stage has not been run.
    """
    path = run_dir / stage / "state.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run the stage {stage!r} first.")
    start = f"average/{prefix}"
    weights = {name.removeprefix(start): t for name, t in load_file(path).items() if name.startswith(start)}
    _load_weights(module, weights)


def load_start(part: nn.Module, checkpoint: Path, name: str) -> None:
    """Load the weights of a part of a checkpoint into a module.

    Args:
        part: The module.
        checkpoint: Folder of the checkpoint.
        name: Name of the part: "vlm", "ctm" or "sam".

    Raises:
        OSError: If there is no checkpoint in the folder.
        ValueError: If the part has another architecture or vocabulary.
    """
    model = ConceptSegForSegmentation.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    try:
        part.load_state_dict(getattr(model, name).state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{str(checkpoint)!r}: its {name} has another architecture or vocabulary than the model that is "
            "trained; give a checkpoint that was trained by the same command and version."
        ) from error


def _load_weights(part: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = part.load_state_dict(weights, strict=False)
    tied = {name for name in missing if name.endswith("lm_head.weight")}
    if unexpected or set(missing) - tied - {name for name, _ in part.named_buffers()}:
        raise ValueError(
            f"the weights of a stage do not fit the model: missing {sorted(set(missing) - tied)}, unexpected "
            f"{unexpected}; train the stage with this version of the code."
        )


def write_checkpoint(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, folder: Path, half: bool = False
) -> None:
    """Write the model and its processor to a checkpoint folder.

    Args:
        model: The model.
        processor: Its processor.
        folder: The folder.
        half: Whether to store the weights in half precision.
    """
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    if half:
        store_in_half_precision(folder)


def store_in_half_precision(checkpoint: Path) -> None:
    """Convert the weights of a checkpoint to float16; they are loaded in float32."""
    path, config_path = checkpoint / "model.safetensors", checkpoint / "config.json"
    weights = {
        name: value.to(torch.float16) if value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, {"format": "pt"})
    # The dtype in which the checkpoint is loaded by default.
    config = json.loads(config_path.read_text(encoding="utf-8"))
    write_file(config_path, json_text({**config, "dtype": "float32"}, indent=2) + "\n")
