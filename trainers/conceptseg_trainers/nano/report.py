"""Evaluate a nano checkpoint on held-out samples and write its model card.

`python -m conceptseg_trainers.nano.report CHECKPOINT` evaluates 300 samples of "test" and of "test-compositional" with
each router mode, 300 samples of the groups beside Table 1, and the prompts of SAM 3 with and without concept tokens. It
writes the tables to CHECKPOINT/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conceptseg_hf.evaluation import EvaluationReport, evaluate
from conceptseg_hf.writing import write_file

from ..experiments.tables import format_mean
from .evidence.concept_tokens import measure as measure_prompts
from .evidence.concept_tokens import table as concept_table

SPLITS = ("test", "test-compositional")
ROUTERS = ("adaptive", "sam_only", "full_reasoning")

_CARD = """---
license: apache-2.0
library_name: conceptseg-hf
tags: [concept-segmentation, conceptseg]
---

# conceptseg-nano{suffix}

{what} ({vlm}, Concept Translation Module,
SAM 3) with {parameters:.1f} million parameters, trained from scratch on ConceptShapes, a procedural benchmark of drawn
scenes.

**Intended use:** demonstrations, tests and teaching; all code of the large models runs on a laptop within seconds.
**Not suitable for** photographs: it was trained only on drawn shapes, with a vocabulary of about {words} words.

## Training

`make nano` (see `trainers/conceptseg_trainers/nano`) trains three stages, each with held-out metrics in its log:

- SAM 3 on noun phrases and boxes, including absent objects. The prompts of the CD tasks ("camouflaged object
  segmentation"), which do not name an object, are trained as absent, without a mask loss.
- The VLM, first on naming and locating objects, then on complete tasks.
- The CTM on completions of the VLM and ground-truth completions, with the VLM and SAM 3 frozen: reading (auxiliary
  heads predict the box and the look from the concept tokens Z), imitating SAM 3's own text or box prompt, then
  segmenting with Z and the answer, Z and its noun, or Z alone.

The vision towers of SAM 3 and the VLM are pretrained on sheets of shapes. Dense heads and guided attention are used in
training only. The VLM was not trained by reinforcement learning.
{notes}
## Held-out results

The first {limit} samples of each split, which are not part of the training data. The targets of `test-compositional`
combine colors and shapes that are not drawn together in training.

{tables}

### Groups beside Table 1

Questions that the noun of the answer does not decide ("which one": siblings that share the noun, or that look
identical), and rules that the references show ("hidden rule"; the split `test-rules` contains rules that training does
not). Full reasoning; "chosen": fraction of the samples whose mask overlaps most with the target.

{further_groups}

### What the concept tokens add

{concept_tokens}
"""
_NAMES = {
    "qwen2_5_vl": (
        "",
        "Qwen2.5-VL",
        "The embedded checkpoint of ConceptSeg-HF: the architecture of ConceptSeg-R1",
    ),
    "qwen3_vl": ("-qwen3", "Qwen3-VL", "The architecture of ConceptSeg-R1 with another VLM"),
}
"""Suffix of the title, name of the VLM and description, by the family of the VLM."""
FURTHER_GROUPS = (("test", "which one"), ("test", "hidden rule"), ("test-rules", "hidden rule"))


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


def further_groups(checkpoint: Path, limit: int, output_dir: Path) -> str:
    """Evaluate the groups beside Table 1, and return a table by stratum."""
    lines = [
        "| split | group | samples | fg IoU | box IoU | check IoU | chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, group in FURTHER_GROUPS:
        report = evaluate(
            str(checkpoint),
            "concept-shapes",
            split=split,
            groups=[group],
            router="full_reasoning",
            limit=limit,
            batch_size=25,
            output_dir=output_dir / f"{split}-{group.replace(' ', '_')}",
            progress=True,
        )
        by_stratum: dict[str, list[dict[str, Any]]] = {}
        for record in report.records:
            by_stratum.setdefault(record.get("stratum") or group, []).append(record)
        for stratum, records in sorted(by_stratum.items()):
            roles = [record.get("chosen") for record in records]
            chosen = [None if role is None else float(role == "target") for role in roles]
            columns = [
                *(
                    [record[name] for record in records]
                    for name in ("foreground_iou", "box_iou", "check_iou")
                ),
                chosen,
            ]
            cells = " | ".join(format_mean(column) for column in columns)
            name = group if stratum == group else f"{group}: {stratum}"
            lines.append(f"| {split} | {name} | {len(records)} | {cells} |")
    return "\n".join(lines)


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
        """Return a column of the row of all groups of a level; None if the level has no samples."""
        rows = (row for row in self._tables[router] if row["level"] == level and row["group"] == "all")
        return next((row[name] for row in rows), None)

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
        "0.65; 0.50",
        lambda results: results.value("full_reasoning", "CI", "box_iou"),
    ),
    (
        "CD, box IoU of completions",
        "0.45",
        lambda results: results.value("full_reasoning", "CD", "box_iou"),
    ),
    (
        "CR, box IoU of completions",
        "0.60; -",
        lambda results: results.value("full_reasoning", "CR", "box_iou"),
    ),
    ("CD, gain over SAM 3 alone", "+0.10", lambda results: results.gain("CD")),
    ("CR, gain over SAM 3 alone", "+0.10", lambda results: results.gain("CR")),
)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_card(
    checkpoint: Path, text: str, groups_text: str, concept_text: str, limit: int, notes: str = ""
) -> None:
    """Write the model card, CHECKPOINT/README.md, with the tables."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    suffix, vlm, what = _NAMES[processor.vlm_family]
    card = _CARD.format(
        suffix=suffix,
        vlm=vlm,
        what=what,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        words=len(processor.sam_tokenizer) // 10 * 10,
        notes=f"\n{notes.strip()}\n" if notes else "",
        limit=limit,
        tables=text,
        further_groups=groups_text,
        concept_tokens=concept_text,
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
    groups_text = further_groups(arguments.checkpoint, arguments.limit, arguments.output_dir)
    concept_text = concept_table([measure_prompts(arguments.checkpoint, arguments.limit)])
    write_card(arguments.checkpoint, text, groups_text, concept_text, arguments.limit, arguments.notes)
    write_file(arguments.output_dir / "tables.md", text + "\n")


if __name__ == "__main__":
    main()
