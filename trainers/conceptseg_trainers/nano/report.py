"""Evaluate a nano checkpoint on held-out samples and write its model card.

`python -m conceptseg_trainers.nano.report CHECKPOINT` evaluates 300 samples of "test" and of "test-compositional" with
each router mode, and writes the tables to CHECKPOINT/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from conceptseg_hf.evaluation import EvaluationReport, evaluate
from conceptseg_hf.writing import write_file

SPLITS = ("test", "test-compositional")
ROUTERS = ("adaptive", "sam_only", "full_reasoning")

_CARD = """---
license: apache-2.0
library_name: conceptseg-hf
tags: [concept-segmentation, conceptseg]
---

# conceptseg-nano

The embedded checkpoint of ConceptSeg-HF: the architecture of ConceptSeg-R1 (Qwen2.5-VL, Concept Translation Module,
SAM 3) with {parameters:.1f} million parameters, trained from scratch on ConceptShapes, a procedural benchmark of drawn
scenes.

**Intended use:** demonstrations, tests and teaching; all code of the large models runs on a laptop within seconds.
**Not suitable for** photographs: it was trained only on drawn shapes, with a vocabulary of about {words} words.

## Training

`make nano` (see `trainers/conceptseg_trainers/nano`) trains three stages, each with held-out metrics in its log:

- SAM 3 on noun phrases and boxes, including absent objects. The prompts of the CD tasks ("camouflaged object
  segmentation"), which do not name an object, are trained as absent, without a mask loss.
- The VLM, first on naming and locating objects, then on complete tasks.
- The CTM on completions of the VLM and ground-truth completions, with the VLM and SAM 3 frozen.

The vision towers of SAM 3 and the VLM are pretrained on sheets of shapes. Dense heads and guided attention are used in
training only. The VLM was not trained by reinforcement learning.
{notes}
## Held-out results

The first {limit} samples of each split, which are not part of the training data. The targets of `test-compositional`
combine colors and shapes that are not drawn together in training.

{tables}
"""


def measure(checkpoint: Path, limit: int, output_dir: Path) -> dict[tuple[str, str], EvaluationReport]:
    """Return the evaluation report of each split and router mode."""
    return {
        (split, router): evaluate(
            str(checkpoint),
            "concept-shapes",
            split=split,
            router=router,
            limit=limit,
            batch_size=25,
            output_dir=output_dir / f"{split}-{router}",
            progress=True,
        )
        for split in SPLITS
        for router in ROUTERS
    }


def tables(reports: dict[tuple[str, str], EvaluationReport]) -> str:
    """Return the results as Markdown: required values, foreground IoU by router mode, and the report by group."""
    lines = ["| measure | test | test-compositional | floor |", "|---|---|---|---|"]
    for name, floor, compute in _FLOORS:
        cells = " | ".join(_cell(compute(_SplitResults(reports, split))) for split in SPLITS)
        lines.append(f"| {name} | {cells} | {floor} |")
    lines += [
        "",
        "Foreground IoU by router mode:",
        "",
        "| split | router | CI | CD | CR | all |",
        "|---|---|---|---|---|---|",
    ]
    for split, router in reports:
        results = _SplitResults(reports, split)
        cells = " | ".join(
            _cell(results.value(router, level, "foreground_iou")) for level in ("CI", "CD", "CR", "all")
        )
        lines.append(f"| {split} | {router} | {cells} |")
    lines += ["", reports["test", "adaptive"].sample_tables()]
    return "\n".join(lines)


class _SplitResults:
    """Results of one split.

    Args:
        reports: Reports by split and router mode.
        split: The split.
    """

    def __init__(self, reports: dict[tuple[str, str], EvaluationReport], split: str) -> None:
        self._tables = {router: report.table for (name, router), report in reports.items() if name == split}
        self._records = {
            router: report.records for (name, router), report in reports.items() if name == split
        }

    def value(self, router: str, level: str, name: str) -> float | None:
        """Return a column of the row of all groups of a level."""
        rows = (row for row in self._tables[router] if row["level"] == level and row["group"] == "all")
        return next(rows)[name]

    def gain(self, level: str) -> float | None:
        """Return the foreground IoU of the adaptive router minus that of SAM 3 alone."""
        adaptive = self.value("adaptive", level, "foreground_iou")
        sam_only = self.value("sam_only", level, "foreground_iou")
        return None if adaptive is None or sam_only is None else adaptive - sam_only

    def shortcut_iou(self) -> float | None:
        """Return the mean foreground IoU of CI samples with a present concept that took the shortcut."""
        records = [
            r
            for r in self._records["adaptive"]
            if r["level"] == "CI" and r["present"] and r["route"] == "shortcut"
        ]
        return sum(r["foreground_iou"] for r in records) / len(records) if records else None


# Name, minimum, and function of each required value.
_FLOORS: tuple[tuple[str, str, Callable[[_SplitResults], float | None]], ...] = (
    ("CI, foreground IoU on the shortcut", "0.65", lambda results: results.shortcut_iou()),
    (
        "CI, presence AUC of SAM 3 alone",
        "0.90",
        lambda results: results.value("sam_only", "CI", "presence_auc"),
    ),
    (
        "format rate of all completions",
        "0.98",
        lambda results: results.value("full_reasoning", "all", "format_rate"),
    ),
    (
        "CI, box IoU of completions",
        "0.45",
        lambda results: results.value("full_reasoning", "CI", "box_iou"),
    ),
    (
        "CD, box IoU of completions",
        "0.45",
        lambda results: results.value("full_reasoning", "CD", "box_iou"),
    ),
    ("CD, gain over SAM 3 alone", "+0.10", lambda results: results.gain("CD")),
    ("CR, gain over SAM 3 alone", "+0.10", lambda results: results.gain("CR")),
)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_card(checkpoint: Path, text: str, limit: int, notes: str = "") -> None:
    """Write the model card, CHECKPOINT/README.md, with the tables."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    card = _CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        words=len(processor.sam_tokenizer) // 10 * 10,
        notes=f"\n{notes.strip()}\n" if notes else "",
        limit=limit,
        tables=text,
    )
    write_file(checkpoint / "README.md", card)


def main() -> None:
    """Evaluate the checkpoint that is given on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--limit", type=int, default=300, help="samples per split (default: %(default)s)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/nano/report"),
        help="folder of records and tables (default: %(default)s)",
    )
    parser.add_argument("--notes", default="", help="paragraph about the training run, for the model card")
    arguments = parser.parse_args()
    text = tables(measure(arguments.checkpoint, arguments.limit, arguments.output_dir))
    write_card(arguments.checkpoint, text, arguments.limit, arguments.notes)
    write_file(arguments.output_dir / "tables.md", text + "\n")


if __name__ == "__main__":
    main()
