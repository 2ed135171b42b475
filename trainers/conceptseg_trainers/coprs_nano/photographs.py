"""The photographs, compositions and drawings that a CoPRS model which starts from mini is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from conceptseg_hf.cards import save_model_card
from conceptseg_hf.coprs import CoPRSConfig, CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.evaluation import evaluate, foreground_iou
from conceptseg_hf.evaluation.metrics.heatmaps import heatmap_scores
from conceptseg_hf.evaluation.reporting.prior_table import prior_section
from conceptseg_hf.writing import write_file

from ..from_scratch.loop import mean
from ..mini.examples import PhotoExampleWriter
from ..mini.results import dataset_table, read_ious
from ..mini.tasks import TrainingTask
from ..mini.vlm_data import PhotosVlmData
from .examples import PriorExample, PriorWriter

_BATCH = 16


class PhotoPriorWriter(PriorWriter, PhotoExampleWriter):
    """Convert scenes and tasks of photographs to examples with concentration tokens."""

    def task(self, task: TrainingTask) -> PriorExample:
        """Create an example of a complete task; its reasoning ends with the answer."""
        prompt = self.task_prompt(task)
        images = [image.pixels for image in prompt.images]
        return self.reasoning_example(
            np.random.default_rng(0), images, prompt.instruction, task.think, task.answer, task.mask
        )


class PhotosPriorData(PhotosVlmData):
    """Examples with concentration tokens; the curriculum is that of mini's VLM.

    Args:
        root: Folder of the benchmark `photos`.
        steps: Number of steps.
        processor: The processor.
        held_out: Number of photographs of the part "val" per dataset and evaluation.
        seed: Random seed.
    """

    def __init__(
        self, root: Path, steps: int, processor: CoPRSProcessor, held_out: int = 8, seed: int = 0
    ) -> None:
        # There is no CTM that needs photographs of its own.
        super().__init__(root, steps, held_out=held_out, seed=seed, part="train")
        self.writer = PhotoPriorWriter(processor)

    def examples(self, step: int) -> Sequence[PriorExample]:
        """Return the examples of a step."""
        return cast(Sequence[PriorExample], super().examples(step))

    def measure(self, model: CoPRSForSegmentation, processor: CoPRSProcessor) -> dict[str, float]:
        """Return the IoU of masks by dataset, and IoU and AUROC of the prior, on photographs of the part "val"."""
        tasks = [(name, task) for name, task in self.held_out_tasks() if task.mask.any()]
        metrics: dict[str, list[float]] = {}
        for start in range(0, len(tasks), _BATCH):
            batch = tasks[start : start + _BATCH]
            prepared = [
                processor.prepare(Image.fromarray(task.pixels), task.prompt, task.references)
                for _, task in batch
            ]
            results = model.segment(prepared, processor=processor)
            for (name, task), result in zip(batch, results, strict=True):
                assert result.mask is not None and result.heatmap is not None
                iou = foreground_iou(np.asarray(result.mask) > 0, task.mask)
                prior = heatmap_scores(result.heatmap, task.mask)
                metrics.setdefault(f"mask_iou_{name}", []).append(iou)
                metrics.setdefault("prior_iou", []).append(prior["iou"])
                metrics.setdefault("auroc", []).append(prior["auroc"])
                metrics.setdefault("correct", []).append(float((result.think or "").endswith(task.answer)))
        return {name: mean(values) for name, values in sorted(metrics.items())}


def write_photos_report(checkpoint: Path, start: str | Path, root: Path, run_dir: Path) -> None:
    """Compare a CoPRS checkpoint with its start on the test split of `photos`, and write its model card.

    Args:
        checkpoint: Folder of the checkpoint.
        start: Folder of mini, which answers all samples by reasoning: the shortcut does not exist in CoPRS.
        root: Folder of the benchmark.
        run_dir: Folder of the run, in which records, reports and `photos.md` are written.
    """
    folders = {"coprs-mini": run_dir / "photos-coprs", "mini, reasoning": run_dir / "photos-start"}
    reports = [
        evaluate(
            str(folder),
            "photos",
            root=root,
            router="full_reasoning",
            batch_size=_BATCH,
            output_dir=output_dir,
            progress=True,
        )
        for folder, output_dir in zip((checkpoint, start), folders.values(), strict=True)
    ]
    columns = {name: read_ious(folder) for name, folder in folders.items()}
    parts = [
        "\n".join(dataset_table(columns, differences=True)),
        "\n".join(prior_section(reports[0].records)),
    ]
    table = "\n\n".join(parts)
    write_file(run_dir / "photos.md", table + "\n")
    command = 'make coprs-nano COPRS_NANO_ARGS="--photos FOLDER"'
    training = (
        "coprs-mini is a small CoPRS model for photographs, for research and non-commercial use only. It starts from "
        f"the VLM and the vision backbone of conceptseg-mini and was trained on the same photographs (`{command}`). "
        f"Foreground IoU on the test split of `photos`:\n\n{table}"
    )
    save_model_card(
        checkpoint,
        CoPRSConfig.from_pretrained(checkpoint),
        training=training,
        overwrite=True,
        license="other",
        license_name="non-commercial-research",
    )
