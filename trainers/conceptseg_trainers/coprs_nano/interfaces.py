"""Compare both interfaces on the same samples: `python -m conceptseg_trainers.coprs_nano.interfaces`.

Concept tokens (nano) and positional prior (coprs-nano) share VLM, vision backbone and training data. Both are evaluated
by `conceptseg_hf.evaluation.evaluate`, whose records resume, and compared sample by sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import compare, evaluate
from conceptseg_hf.evaluation.records.choice import TARGET
from conceptseg_hf.evaluation.reporting.comparison import Comparison
from conceptseg_hf.evaluation.reporting.prior_table import prior_rows
from conceptseg_hf.evaluation.reporting.tables import interval_text, markdown_table
from conceptseg_hf.loading import find_checkpoint, load_model_and_processor
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.writing import write_file

from ..experiments.tables import paired

SETS: dict[str, list[str] | None] = {
    "Table 1": None,
    "which one": ["which one"],
    "hidden rule": ["hidden rule"],
}
"""Groups of ConceptShapes by set."""

_BATCH = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate both checkpoints, and print the table.

    Returns:
        The exit code: 0; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.interfaces",
        description="Compare concept tokens (ConceptSeg) and positional prior (CoPRS) on the same samples.",
    )
    for name, default in (("conceptseg", "nano"), ("coprs", "coprs-nano")):
        parser.add_argument(
            f"--{name}", default=default, help="name or folder of the checkpoint (default: %(default)s)"
        )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/coprs-nano/interfaces"),
        help="folder of records and tables (default: %(default)s)",
    )
    parser.add_argument(
        "--split", default="test", choices=["val", "test", "test-compositional"], help="default: %(default)s"
    )
    parser.add_argument("--samples", type=int, default=900, help="samples per set (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's default)")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}; use at least 1.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    checkpoints = (arguments.conceptseg, arguments.coprs)
    try:
        for checkpoint in checkpoints:
            find_checkpoint(checkpoint)
        comparisons = compare_on_sets(*checkpoints, arguments.output_dir, arguments.split, arguments.samples)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command to continue.\n")
        return 130
    text = table(comparisons)
    write_file(arguments.output_dir / "interfaces.md", text)
    sys.stdout.write(text)
    return 0


def compare_on_sets(
    conceptseg: str, coprs: str, folder: Path, split: str, samples: int
) -> dict[str, Comparison]:
    """Evaluate both checkpoints on each set, and compare them; finished samples are not repeated.

    Args:
        conceptseg: Name or folder of the ConceptSeg checkpoint.
        coprs: Name or folder of the CoPRS checkpoint.
        folder: Folder of the records.
        split: Split of ConceptShapes.
        samples: Number of samples per set.

    Raises:
        OSError: If a checkpoint cannot be found.
        ValueError: If the folder has the records of other checkpoints.
    """
    for name, checkpoint in (("conceptseg", conceptseg), ("coprs", coprs)):
        model, processor = load_model_and_processor(checkpoint)
        for set_name, groups in SETS.items():
            evaluate(
                model,
                ConceptShapes(split, size=SIDE, groups=groups),
                processor=processor,
                batch_size=_BATCH,
                limit=samples,
                output_dir=folder / name / set_name.replace(" ", "-"),
                progress=True,
            )
    return {
        name: compare(
            folder / "conceptseg" / name.replace(" ", "-"),
            folder / "coprs" / name.replace(" ", "-"),
            ("ConceptSeg", "CoPRS"),
        )
        for name in SETS
    }


def table(comparisons: dict[str, Comparison]) -> str:
    """Return the comparison as Markdown: masks, chosen objects, and the prior of CoPRS."""
    masks, choices, priors = [], [], []
    for name, comparison in comparisons.items():
        # Summary rows of a set with one group would repeat its row.
        for row in (row for row in comparison.table if SETS[name] is None or row.group != "all"):
            difference = interval_text(row.difference, 3, signed=True)
            masks.append(
                [
                    row.level,
                    row.group,
                    str(row.difference.samples),
                    f"{row.first:.3f}",
                    f"{row.second:.3f}",
                    difference,
                ]
            )
        choices += _choices(name, comparison)
        for prior in prior_rows([pair.second for pair in comparison.pairs])[-1:]:
            cells = [interval_text(prior["intervals"][key], 3) for key in ("iou", "auroc", "share")]
            correlation = interval_text(prior["correlations"]["iou"], 3)
            priors.append([name, str(prior["samples"]), *cells, correlation])
    heading = ["samples", "ConceptSeg", "CoPRS", "CoPRS - ConceptSeg [95 % interval]"]
    lines = ["Foreground IoU of the masks:", "", *markdown_table(["level", "group", *heading], masks)]
    if choices:
        lines += ["", "Fraction of masks that overlap most with the target:", ""]
        lines += markdown_table(["set", *heading], choices)
    lines += ["", "Positional prior of CoPRS:", ""]
    names = ["prior IoU", "AUROC", "share among siblings", "correlation of prior IoU and mask IoU"]
    lines += markdown_table(["set", "samples", *names], priors)
    lines += ["", "Intervals: 95 %, by bootstrap; differences are paired by sample."]
    return "\n".join(lines) + "\n"


def _choices(name: str, comparison: Comparison) -> list[list[str]]:
    """Return the row of a set about the chosen objects; none for sets without candidates."""
    pairs = [(pair.first, pair.second) for pair in comparison.pairs if "chosen" in pair.first]
    if not pairs:
        return []
    first, second = ([float(record["chosen"] == TARGET) for record in side] for side in zip(*pairs))
    interval = paired(second, first, f"chosen/{name}")
    means = [f"{sum(values) / len(values):.3f}" for values in (first, second)]
    return [[name, str(len(pairs)), *means, interval_text(interval, 3, signed=True)]]


if __name__ == "__main__":
    sys.exit(main())
