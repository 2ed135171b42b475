"""`conceptseg data`: which data sets there are, and whether one is complete."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import as_bad_input


def add_parser(verbs: Any) -> None:
    """Adds the verb to the command."""
    parser = verbs.add_parser(
        "data",
        help="list the benchmarks, and check the files of one",
        description="Lists the benchmarks of the suite, or says what of one is there.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every benchmark: what it asks, how much there is, and where")
    listing.set_defaults(run=run_list)
    check = actions.add_parser(
        "check",
        help="say what of a benchmark is there, what is missing, and whether counts match the paper",
        description="Exit code 0: all is there; 1: something is missing or a count differs; 2: bad input.",
    )
    check.add_argument("name", metavar="NAME", help="name of the benchmark, as conceptseg data list has it")
    check.add_argument("--root", required=True, metavar="DIR", help="folder of its files")
    check.add_argument("--split", help="one split (default: those that the paper counts)")
    check.set_defaults(run=run_check)


def run_list(arguments: argparse.Namespace) -> int:
    """Prints the suite."""
    from conceptseg_hf.data import SOURCES, SUITE

    headings = ("name", "title", "level", "group", "counts", "asks", "layout", "published")
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
    print("concept-shapes is drawn from seeds and needs no files.")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Prints the state of a benchmark; 0 if it is complete, else 1."""
    from conceptseg_hf.data import check_benchmark, get_source

    source = as_bad_input(get_source, arguments.name)
    checks = as_bad_input(check_benchmark, arguments.name, arguments.root, arguments.split)
    for check in checks:
        print("\n".join(check.lines()))
    if all(check.complete for check in checks):
        print("complete")
        return 0
    print("not complete" + (f"; published at {source.published}" if source.published else ""))
    return 1


def _row(source: Any) -> tuple[str, ...]:
    # The paper's counts; of its own sets those of the splits that it names.
    splits = source.paper_splits or tuple(source.counts)
    counts = ", ".join(f"{split} {source.counts[split] or ''}".strip() for split in splits)
    asks = "its own words" if source.problem is None else source.problem
    return (
        source.name,
        source.title,
        source.level,
        source.group,
        counts,
        asks,
        source.layout,
        source.published,
    )
