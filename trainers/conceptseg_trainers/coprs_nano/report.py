"""Write the checkpoint of coprs-nano in float16, and its table of held-out results."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conceptseg_hf.coprs import CoPRSForSegmentation
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.writing import json_text, write_file

from ..from_scratch.loop import Schedule, TrainingState
from .measuring import measure, summarize
from .stage import PriorStage

SETS = {
    "CI": 4,
    "CD": 3,
    "CR one image": 12,
}  # samples of a round of ConceptShapes per sample of the set, at least


def write_report(
    stage: PriorStage, schedule: Schedule, run_dir: Path, folder: Path, samples: int
) -> dict[str, dict[str, float]]:
    """Write the averaged weights as a checkpoint, load it, measure it, and write `results.json` in the run's folder."""
    TrainingState(stage.module, schedule, run_dir / stage.name / "state.safetensors").load_average()
    write_checkpoint(stage.model, folder)
    model = CoPRSForSegmentation.from_pretrained(folder)
    rows = measure(model, model.processor, ConceptShapes("test", size=SIDE), 4 * samples)
    rows += measure(model, model.processor, ConceptShapes("test", size=SIDE, groups=["which one"]), samples)
    summary = summarize(rows)
    write_file(run_dir / "results.json", json_text(summary, indent=2) + "\n")
    return summary


def write_checkpoint(model: CoPRSForSegmentation, folder: Path) -> None:
    """Write model and processor; weights are stored in float16 and loaded in float32."""
    model.eval().cpu().save_pretrained(folder)
    model.processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {
        name: value.to(torch.float16) if value.is_floating_point() else value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, {"format": "pt"})
