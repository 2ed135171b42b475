"""Measures a nano checkpoint on held-out samples and writes its model card.

`python -m conceptseg_trainers.nano.report CHECKPOINT` evaluates 300 samples of "test" and of "test-compositional" with
every router mode, prints the tables, and writes them into CHECKPOINT/README.md.
"""

from __future__ import annotations

import argparse
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

The embedded checkpoint of ConceptSeg-HF: the architecture of ConceptSeg-R1
(Qwen2.5-VL, Concept Translation Module, SAM 3) with {parameters:.1f} million parameters, trained from scratch on
ConceptShapes, a procedural benchmark of drawn scenes.

**For** demonstration, tests and teaching: every code path of the large models runs on a laptop in a moment.
**Not for** photographs: it has seen nothing but drawn shapes and knows some {words} words.

## Training

`make nano` (see `trainers/conceptseg_trainers/nano`), three stages, each with held-out numbers in its log: SAM 3 on
noun phrases and boxes, with presence; the VLM from naming and finding things to whole tasks; the CTM on completions of
the VLM with the rest frozen. The vision towers of SAM 3 and the VLM first learn to see, on sheets of shapes. Dense
heads and guided attention help SAM 3 and the VLM to learn and are thrown away. SAM 3 is
also taught that the three-word names of the CD tasks ("camouflaged object segmentation") are no names of things:
presence 0, no mask loss. The VLM was not trained by reinforcement learning.
{notes}
## Held-out results

{limit} samples per split, in the order of the split; drawn with seeds that training never uses. `test-compositional`
joins colors and shapes that training never drew together.

{tables}
"""


def measure(checkpoint: Path, limit: int, output_dir: Path) -> dict[tuple[str, str], EvaluationReport]:
    """One report per split and router mode."""
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
    """The results as Markdown: floors, foreground IoU by router mode, and the adaptive report by group."""
    lines = ["| measure | test | test-compositional | floor |", "|---|---|---|---|"]
    for name, floor, value in _FLOORS:
        cells = " | ".join(_cell(value(_Rows(reports, split))) for split in SPLITS)
        lines.append(f"| {name} | {cells} | {floor} |")
    lines += [
        "",
        "Foreground IoU by router mode:",
        "",
        "| split | router | CI | CD | CR | all |",
        "|---|---|---|---|---|---|",
    ]
    for split, router in reports:
        rows = _Rows(reports, split)
        cells = " | ".join(
            _cell(rows.value(router, level, "foreground_iou")) for level in ("CI", "CD", "CR", "all")
        )
        lines.append(f"| {split} | {router} | {cells} |")
    lines += ["", reports["test", "adaptive"].sample_tables()]
    return "\n".join(lines)


class _Rows:
    """Values of the reports of one split."""

    def __init__(self, reports: dict[tuple[str, str], EvaluationReport], split: str) -> None:
        self._tables = {router: report.table for (name, router), report in reports.items() if name == split}
        self._records = {
            router: report.records for (name, router), report in reports.items() if name == split
        }

    def value(self, router: str, level: str, name: str) -> float | None:
        rows = (row for row in self._tables[router] if row["level"] == level and row["group"] == "all")
        return next(rows)[name]

    def gain(self, level: str) -> float:
        """What the full model adds to SAM 3 alone."""
        return self.value("adaptive", level, "foreground_iou") - self.value(
            "sam_only", level, "foreground_iou"
        )

    def shortcut_iou(self) -> float | None:
        """Foreground IoU of the CI samples that took the shortcut and show their concept."""
        records = [
            r
            for r in self._records["adaptive"]
            if r["level"] == "CI" and r["present"] and r["route"] == "shortcut"
        ]
        return sum(r["foreground_iou"] for r in records) / len(records) if records else None


_FLOORS = (
    ("CI, foreground IoU on the shortcut", "0.65", lambda rows: rows.shortcut_iou()),
    (
        "CI, presence AUC of SAM 3's first look",
        "0.90",
        lambda rows: rows.value("sam_only", "CI", "presence_auc"),
    ),
    (
        "format rate of all completions",
        "0.98",
        lambda rows: rows.value("full_reasoning", "all", "format_rate"),
    ),
    ("CI, box IoU of completions", "0.45", lambda rows: rows.value("full_reasoning", "CI", "box_iou")),
    ("CD, box IoU of completions", "0.45", lambda rows: rows.value("full_reasoning", "CD", "box_iou")),
    ("CD, gain over SAM 3 alone", "+0.10", lambda rows: rows.gain("CD")),
    ("CR, gain over SAM 3 alone", "+0.10", lambda rows: rows.gain("CR")),
)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_card(checkpoint: Path, text: str, limit: int, notes: str = "") -> None:
    """Writes CHECKPOINT/README.md around the tables."""
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
    """Measures the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="samples per split (default: %(default)s)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/nano/report"), help="default: %(default)s"
    )
    parser.add_argument("--notes", default="", help="a paragraph for the model card, about this training run")
    arguments = parser.parse_args()
    text = tables(measure(arguments.checkpoint, arguments.limit, arguments.output_dir))
    write_card(arguments.checkpoint, text, arguments.limit, arguments.notes)
    write_file(arguments.output_dir / "tables.md", text + "\n")


if __name__ == "__main__":
    main()
