"""`conceptseg compare`: paired comparison of two evaluations of the same samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import BadInputError, add_output_option, add_root_option, as_bad_input, parse_roots
from .outputs import check_output_dir

FILES = ("comparison.md", "comparison.json", "comparison.csv", "gallery.html")


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "compare",
        help="compare two evaluations sample by sample",
        description="Writes comparison.md, comparison.json, comparison.csv (one sample per line) and gallery.html "
        "(the samples that differ most). Differences are B - A.",
    )
    parser.add_argument("first", metavar="A", help="output folder of an evaluation")
    parser.add_argument(
        "second",
        metavar="B",
        help="output folder of another evaluation with the same benchmarks and protocol",
    )
    add_root_option(parser, "dataset folder, needed for the images in the gallery")
    add_output_option(parser, "comparison_output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    for folder in (arguments.first, arguments.second):
        if not Path(folder).is_dir():
            raise BadInputError(f"{folder!r} is not a folder; give an output folder of conceptseg evaluate.")
    folder = check_output_dir(arguments.output_dir, *FILES)
    from conceptseg_hf.data import SOURCES, load_benchmarks
    from conceptseg_hf.data.registry import COMPOSED, PROCEDURAL
    from conceptseg_hf.evaluation.reporting.comparison import compare

    comparison = as_bad_input(compare, arguments.first, arguments.second)
    roots = parse_roots(arguments.root)
    names = {pair.source[0] for pair in comparison.pairs}
    readable = names <= set(PROCEDURAL) or (bool(roots) and names <= {*PROCEDURAL, *COMPOSED, *SOURCES})

    def open_samples(name: str, split: str) -> Any:
        first = comparison.settings[0]
        sampling = {"seed": first.get("seed", 42), "loader": first.get("loader", "default")}
        root = None if name in PROCEDURAL else roots
        return as_bad_input(load_benchmarks, name, root=root, split=split, **sampling)

    folder.mkdir(parents=True, exist_ok=True)
    comparison.write(folder, open_samples if readable else None)
    print(comparison.to_markdown())
    print(folder / "comparison.md")
    if readable:
        print(folder / "gallery.html")
    else:
        print("gallery.html was not written; give the dataset folder with --root")
    return 0
