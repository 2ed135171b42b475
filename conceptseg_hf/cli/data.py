"""`conceptseg data`: list of the benchmarks, and checks that their datasets are complete."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arguments import BadInputError, add_root_option, as_bad_input, parse_roots
from .outputs import check_output_file

if TYPE_CHECKING:
    from conceptseg_hf.data import DataCheck


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "data",
        help="list the benchmarks and check their files",
        description="Lists the benchmarks of the suite, or checks whether their files are complete.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list all benchmarks with prompts, sample counts and sources")
    listing.set_defaults(run=run_list)
    check = actions.add_parser(
        "check",
        help="report available and missing files, and whether the counts match the paper",
        description="Reads ground-truth masks and references completely, and the headers of all other images. If the "
        "train split is checked together with other splits, their images are compared with the training images, and "
        "duplicates are listed. Exit code 0: complete and usable (duplicates included); 1: files are missing or "
        "unusable, or a count differs; 2: invalid input.",
    )
    check.add_argument(
        "name",
        metavar="NAME",
        help="a benchmark listed by conceptseg data list, a group (table1, ci, cd, cr, all), or a comma-separated "
        "list of them",
    )
    add_root_option(check)
    check.add_argument(
        "--split",
        help="split of benchmarks given by name (default: the splits that the paper counts, or all splits of custom "
        "data); groups use the splits of the paper",
    )
    check.add_argument(
        "--duplicates",
        metavar="FILE",
        help="write the samples of duplicates to a .csv file, which conceptseg evaluate --exclude reads",
    )
    check.set_defaults(run=run_check)


def run_list(arguments: argparse.Namespace) -> int:
    """Print the list of benchmarks."""
    from conceptseg_hf.data import SOURCES, SUITE

    headings = ("name", "title", "level", "group", "counts", "prompt", "layout", "published")
    for title, names in (
        ("The paper's suite (Tables 5 and 6):", SUITE),
        ("Other sources:", [name for name in SOURCES if name not in SUITE]),
    ):
        rows = [_row(SOURCES[name]) for name in names]
        widths = [max(map(len, column)) for column in zip(headings, *rows)]
        print(title)
        for row in (headings, *rows):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        notes = [f"  {name}: {SOURCES[name].note}." for name in names if SOURCES[name].note]
        print("\n".join(notes), end="\n\n")
    print("concept-shapes is generated from random seeds and needs no files.")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Print the state of benchmarks; return 0 if all are complete, else 1."""
    if arguments.duplicates is not None:
        check_output_file(arguments.duplicates, "--duplicates")
    from conceptseg_hf.data import SOURCES, check_benchmarks

    checks = as_bad_input(
        check_benchmarks, arguments.name, parse_roots(arguments.root), arguments.split, progress=True
    )
    for check in checks:
        print("\n".join(check.lines()))
    if arguments.duplicates is not None:
        _write_duplicates(checks, arguments.duplicates)
    incomplete = dict.fromkeys(check.name for check in checks if not check.complete)
    if not incomplete:
        print("complete")
        return 0
    total = len({check.name for check in checks})
    which = f" ({len(incomplete)} of {total} benchmarks)" if total > 1 else ""
    published = ", ".join(dict.fromkeys(SOURCES[name].published for name in incomplete))
    print(f"not complete{which}" + (f"; published at {published}" if published else ""))
    return 1


def _write_duplicates(checks: Sequence[DataCheck], path: str) -> None:
    """Write one line per sample whose image is a duplicate of a training image."""
    from conceptseg_hf.evaluation.reporting.tables import csv_text
    from conceptseg_hf.writing import write_file

    if all(check.duplicates is None for check in checks):
        raise BadInputError(
            "--duplicates: no train split was checked together with another split; leave --split out, or the option."
        )
    rows = [
        {
            "sample_id": sample_id,
            "split": check.split,
            "dataset": pair.dataset,
            "image": os.path.relpath(pair.image, check.root),
            "train_image": os.path.relpath(pair.train_image, check.root),
            "bits": pair.distance,
            "exact": pair.is_exact,
        }
        for check in checks
        if check.duplicates is not None and check.root is not None
        for pair in check.duplicates.found
        for sample_id in pair.sample_ids
    ]
    text = csv_text(rows) if rows else "sample_id\n"
    as_bad_input(write_file, path, text)
    print(path)


def _row(source: Any) -> tuple[str, ...]:
    # Counts of the splits that the paper uses; if it uses none, counts of all splits.
    splits = source.paper_splits or tuple(source.counts)
    counts = ", ".join(f"{split} {source.counts[split] or ''}".strip() for split in splits)
    prompt = "the prompts of the data" if source.problem is None else source.problem
    return (
        source.name,
        source.title,
        source.level,
        source.group,
        counts,
        prompt,
        source.layout,
        source.published,
    )
