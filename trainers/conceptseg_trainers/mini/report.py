"""Evaluate a checkpoint for photographs on held-out photographs and write its model card.

`python -m conceptseg_trainers.mini.report CHECKPOINT --root PHOTOS` evaluates the test split of `photos` with each
router mode, and the first samples of ConceptPhotos and ConceptShapes. It writes the tables to CHECKPOINT/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.evaluation import EvaluationReport, evaluate
from conceptseg_hf.evaluation.reporting.bootstrap import foreground_iou
from conceptseg_hf.evaluation.reporting.tables import fraction, markdown_table
from conceptseg_hf.writing import write_file

from ..from_scratch.command import require_checkpoint
from .leaks import training_items
from .nouns import PHOTO_NOUNS
from .results import dataset_table, named_folder, read_ious

ROUTERS = {"adaptive": "mini", "sam_only": "SAM 3 alone", "full_reasoning": "full reasoning"}
"""Router modes, and the names of their columns."""

_CARD = """---
license: other
license_name: non-commercial-research
library_name: conceptseg-hf
tags: [concept-segmentation, conceptseg]
---

# conceptseg-mini

The checkpoint of ConceptSeg-HF for photographs: the architecture of ConceptSeg-R1 (Qwen2.5-VL, Concept Translation
Module, SAM 3) with {parameters:.1f} million parameters, for images of 224 pixels in 16 x 16 patches, trained from
scratch on two CPU cores.

**Intended use:** research and demonstrations on photographs of the kinds below: skin lesions, polyps, breast
ultrasound, steel and tile defects, cracks, camouflaged and salient objects, glass, shadow, street scenes, crops,
changes.
**Not suitable for** any decision, medical or other; objects beyond its vocabulary of about {words} words; small or thin
objects.
**Non-commercial use only**, because most of the training datasets permit nothing else (conceptseg-nano has no such
limit).

**Nouns** of photographs that it was trained with: {nouns}.
**Prompts**: these nouns, and {prompts}.

## Training

`make mini MINI_ARGS="--root PHOTOS"` (see `trainers/conceptseg_trainers/mini`) trains three stages:

- SAM 3: dense pretraining of the vision tower, then noun phrases, boxes and absent objects.
- The VLM: dense pretraining, then naming and locating objects and complete tasks.
- The CTM on completions of the VLM, with the VLM and SAM 3 frozen.

Data: the train splits of {datasets_trained} public datasets ({training} of {available} samples; {left_out} are left out
because their images are near duplicates of test images, or show a tested tile), compositions of them (ConceptPhotos),
and drawings (ConceptShapes). Nothing else is pretrained, and no reinforcement learning was used.
{notes}
## Held-out results

Foreground IoU on the test split of `photos` ({samples} samples), with 95 % bootstrap intervals over samples; the last
columns are paired differences. References are drawn from the train splits (seed 42). Datasets without training data:
{untrained}.

{datasets}

Other benchmarks of this package, foreground IoU:

{others}

### By group, adaptive router

{tables}
"""


def measure(checkpoint: Path, root: Path, limit: int | None, output_dir: Path) -> dict[str, EvaluationReport]:
    """Return the evaluation report on the test split of `photos` of each router mode."""
    return {
        router: evaluate(
            str(checkpoint),
            "photos",
            root=root,
            router=router,
            limit=limit,
            batch_size=16,
            output_dir=output_dir / router,
            progress=True,
        )
        for router in ROUTERS
    }


def other_benchmarks(checkpoint: Path, root: Path, limit: int, output_dir: Path) -> list[str]:
    """Evaluate the first samples of ConceptPhotos and ConceptShapes, and return a table."""
    lines = []
    for name, title in (("concept-photos", "ConceptPhotos"), ("concept-shapes", "ConceptShapes")):
        report = evaluate(
            str(checkpoint),
            load_benchmark(name, root=root if name == "concept-photos" else None, limit=limit),
            batch_size=16,
            output_dir=output_dir / name,
            progress=True,
        )
        for level in report.levels:
            records = [record for record in report.records if record["level"] == level]
            mean, interval = foreground_iou(records, f"{name} {level}")
            ends = "-" if interval is None else " to ".join(map(fraction, interval))
            lines.append([title, level, str(len(records)), fraction(mean), ends])
    return markdown_table(["benchmark", "level", "samples", "fg IoU", "95 % interval"], lines)


def write_card(
    checkpoint: Path, root: Path, reports: Mapping[str, EvaluationReport], texts: Mapping[str, str]
) -> None:
    """Write the model card, CHECKPOINT/README.md.

    Args:
        checkpoint: Folder of the checkpoint.
        root: Folder of the benchmark `photos`.
        reports: Reports by router mode.
        texts: Tables "datasets" and "others", and the paragraph "notes".
    """
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    available, training = len(load_benchmark("photos", root, "train")), training_items(root)
    trained = {item.dataset for item in training}
    prompts = {item.prompt for item in training} - set(PHOTO_NOUNS)
    tested = {record["dataset"] for record in reports["adaptive"].records}
    notes = texts["notes"].strip()
    card = _CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        words=len(processor.sam_tokenizer) // 10 * 10,
        nouns=", ".join(sorted(PHOTO_NOUNS)),
        prompts=", ".join(f'"{prompt}"' for prompt in sorted(prompts)),
        datasets_trained=len(trained),
        untrained=", ".join(sorted(tested - trained)) or "none",
        training=f"{len(training):,}",
        available=f"{available:,}",
        left_out=available - len(training),
        samples=f"{len(reports['adaptive'].records):,}",
        notes=f"\n{notes}\n" if notes else "",
        datasets=texts["datasets"],
        others=texts["others"],
        tables=reports["adaptive"].sample_tables(),
    )
    write_file(checkpoint / "README.md", card)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the checkpoint that is given on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.mini.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--root", type=Path, required=True, help="folder of the benchmark photos")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        type=named_folder,
        metavar="NAME=FOLDER",
        help="another evaluation of the benchmark to compare with, such as that of a U-Net (can be repeated)",
    )
    parser.add_argument("--limit", type=int, help="use only the first samples of photos")
    parser.add_argument(
        "--other-limit",
        type=int,
        default=300,
        help="samples of ConceptPhotos and ConceptShapes (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/mini/report"),
        help="folder of records and tables (default: %(default)s)",
    )
    parser.add_argument("--notes", default="", help="paragraph about the training run, for the model card")
    arguments = parser.parse_args(argv)
    require_checkpoint(parser, arguments.checkpoint, "train one with `make mini`")
    reports = measure(arguments.checkpoint, arguments.root, arguments.limit, arguments.output_dir)
    others = other_benchmarks(
        arguments.checkpoint, arguments.root, arguments.other_limit, arguments.output_dir
    )
    columns = {title: read_ious(arguments.output_dir / router) for router, title in ROUTERS.items()}
    columns |= {name: read_ious(folder) for name, folder in arguments.beside}
    texts = {
        "datasets": "\n".join(dataset_table(columns, differences=True)),
        "others": "\n".join(others),
        "notes": arguments.notes,
    }
    write_card(arguments.checkpoint, arguments.root, reports, texts)
    write_file(arguments.output_dir / "tables.md", f"{texts['datasets']}\n\n{texts['others']}\n")


if __name__ == "__main__":
    main()
