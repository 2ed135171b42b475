"""Write the checkpoint of coprs-nano in float16, and its table of held-out results beside those of nano.

`python -m conceptseg_trainers.coprs_nano.report [CHECKPOINT]` measures a checkpoint, by default the embedded one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from conceptseg_hf import ConceptSegForSegmentation, coprs_nano_checkpoint, nano_checkpoint
from conceptseg_hf.cards import save_model_card
from conceptseg_hf.coprs import CoPRSConfig, CoPRSForSegmentation
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.evaluation.records import segment_samples
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.writing import json_text, write_file

from ..from_scratch.assemble import store_in_half_precision
from ..from_scratch.command import require_checkpoint
from .measuring import MeasuredSample, bootstrap_mean, measure, set_of, summarize

_BATCH = 30
_METRICS = {
    "mask_iou": "mask IoU",
    "prior_iou": "prior IoU",
    "auroc": "prior AUROC",
    "average_precision": "prior AP",
    "share": "share among siblings",
}

Summary = Mapping[str, Mapping[str, float]]


def write_report(checkpoint: Path, run_dir: Path, samples: int) -> None:
    """Measure a checkpoint on held-out samples, and write its model card.

    Args:
        checkpoint: Folder of the checkpoint.
        run_dir: Folder of the run, in which `results.json` and `results.md` are written.
        samples: Number of samples; see `write_results`.
    """
    table = write_results(checkpoint, run_dir, samples)
    training = (
        "coprs-nano is a small CoPRS model for demonstrations, tests and teaching. It starts from the VLM and the "
        "vision backbone of conceptseg-nano and was trained with supervision on ConceptShapes (`make coprs-nano`); its "
        f"weights are stored in float16.\n\n{table}"
    )
    config = CoPRSConfig.from_pretrained(checkpoint)
    save_model_card(checkpoint, config, training=training, overwrite=True, license="apache-2.0")


def write_results(checkpoint: Path, output_dir: Path, samples: int) -> str:
    """Measure a checkpoint on held-out samples, write `results.json` and `results.md`, and return the table.

    Args:
        checkpoint: Folder of the checkpoint.
        output_dir: Folder of the files.
        samples: Number of samples of the set CI; 4 times as many of the split "test" are measured, and as many of its
            group "which one".
    """
    model = CoPRSForSegmentation.from_pretrained(checkpoint)
    splits = {
        "test": (ConceptShapes("test", size=SIDE), 4 * samples),
        "which one": (ConceptShapes("test", size=SIDE, groups=["which one"]), samples),
    }
    nano_model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    nano_processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    rows: list[MeasuredSample] = []
    nano: dict[str, list[float]] = {}
    for source, count in splits.values():
        rows += measure(model, model.processor, source, count)
        for name, iou in nano_ious(nano_model, nano_processor, source, count):
            nano.setdefault(name, []).append(iou)
    summary = summarize(rows)
    nano_summary = {f"mask_iou_{name}": bootstrap_mean(values) for name, values in nano.items()}
    table = markdown(summary, nano_summary)
    write_file(
        output_dir / "results.json", json_text({"coprs-nano": summary, "nano": nano_summary}, indent=2) + "\n"
    )
    write_file(output_dir / "results.md", table + "\n")
    return table


def write_checkpoint(model: CoPRSForSegmentation, folder: Path) -> None:
    """Write model and processor; weights are stored in float16 and loaded in float32."""
    model.eval().cpu().save_pretrained(folder)
    model.processor.save_pretrained(folder)
    store_in_half_precision(folder)


def nano_ious(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, samples: ConceptShapes, count: int
) -> list[tuple[str, float]]:
    """Return set and foreground IoU of the masks of conceptseg-nano for the first samples of a split."""
    ious: list[tuple[str, float]] = []
    bar = progress_bar(count, "samples", "nano", mininterval=5)
    for start in range(0, count, _BATCH):
        batch = [samples[i] for i in range(start, min(start + _BATCH, count))]
        for sample, result in zip(batch, segment_samples(model, processor, batch), strict=True):
            ious.append(
                (set_of(sample), foreground_iou(np.asarray(result.mask) > 0, np.asarray(sample.mask) > 0))
            )
        bar.update(len(batch))
    bar.close()
    return ious


def markdown(summary: Summary, nano: Summary) -> str:
    """Return the results as Markdown: sets in rows, means with 95 % intervals."""
    sets = [name.removeprefix("mask_iou_") for name in summary if name.startswith("mask_iou_")]
    lines = [
        "| set | n | nano, mask IoU | " + " | ".join(_METRICS.values()) + " |",
        "|---|---|---|" + "---|" * len(_METRICS),
    ]
    for name in sets:
        cells = [
            _cell(nano.get(f"mask_iou_{name}")),
            *(_cell(summary.get(f"{key}_{name}")) for key in _METRICS),
        ]
        lines.append(f"| {name} | {summary[f'mask_iou_{name}']['n']} | {' | '.join(cells)} |")
    correlation = summary["correlation_prior_iou"]
    note = (
        f"Correlation of prior IoU and mask IoU over {correlation['n']} samples that contain the target: "
        f"{_cell(correlation)}. Completions that follow the template: {summary['format']['mean']:.3f}."
    )
    lines += ["", note]
    return "\n".join(lines)


def _cell(values: Mapping[str, float] | None) -> str:
    if values is None or not values["n"] or math.isnan(values["mean"]):
        return "-"
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the checkpoint that is given on the command line, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.coprs_nano.report",
        description="Measure a CoPRS checkpoint on held-out samples of ConceptShapes, beside nano.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        default=coprs_nano_checkpoint(),
        help="folder of the checkpoint (default: the embedded coprs-nano)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=300,
        help='samples of CI; 4 times as many of the split, and as many of its group "which one" (default: %(default)s)',
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/coprs-nano/report"),
        help="folder of results.json and results.md (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}; use at least 1.")
    require_checkpoint(parser, arguments.checkpoint, "train one with `make coprs-nano`")
    sys.stdout.write(write_results(arguments.checkpoint, arguments.output_dir, arguments.samples) + "\n")


if __name__ == "__main__":
    main()
