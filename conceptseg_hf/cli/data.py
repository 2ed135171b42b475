"""`conceptseg data`: which data sets there are, and whether one is complete."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_root_option, as_bad_input, parse_roots


def add_parser(subcommands: Any) -> None:
    """Adds the subcommand to the command."""
    parser = subcommands.add_parser(
        "data",
        help="list the benchmarks, and check their files",
        description="Lists the benchmarks of the suite, or says what of them is there.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every benchmark: what it asks, how much there is, and where")
    listing.set_defaults(run=run_list)
    check = actions.add_parser(
        "check",
        help="say what of benchmarks is there, what is missing, and whether counts match the paper",
        description="Reads true masks and all references; of other images only the headers. Exit code 0: all is there "
        "and can be used; 1: something is missing or cannot be used, or a count differs; 2: bad input.",
    )
    check.add_argument(
        "name",
        metavar="NAME",
        help="a benchmark, as conceptseg data list has it, a group (table1, ci, cd, cr, all), or several with commas "
        "between them",
    )
    add_root_option(check)
    check.add_argument(
        "--split",
        help="split of benchmarks given by name (default: those that the paper counts, of your own data all); groups "
        "have those of the paper",
    )
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
    """Prints the state of benchmarks; 0 if all are complete, else 1."""
    from conceptseg_hf.data import SOURCES, check_benchmarks

    checks = as_bad_input(
        check_benchmarks, arguments.name, parse_roots(arguments.root), arguments.split, progress=True
    )
    for check in checks:
        print("\n".join(check.lines()))
    incomplete = dict.fromkeys(check.name for check in checks if not check.complete)
    if not incomplete:
        print("complete")
        return 0
    total = len({check.name for check in checks})
    which = f" ({len(incomplete)} of {total} benchmarks)" if total > 1 else ""
    published = ", ".join(dict.fromkeys(SOURCES[name].published for name in incomplete))
    print(f"not complete{which}" + (f"; published at {published}" if published else ""))
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
