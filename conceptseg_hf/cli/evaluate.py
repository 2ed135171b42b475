"""`conceptseg evaluate`: a benchmark's records, its table, and one line of foreground IoU."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import (
    add_model_options,
    as_bad_input,
    check_model,
    load_model,
    make_output_dir,
    positive_int,
)


def add_parser(verbs: Any) -> None:
    """Adds the verb to the command."""
    parser = verbs.add_parser(
        "evaluate",
        help="score a checkpoint on a benchmark",
        description="Writes records.jsonl, report.md and report.json. A run that was stopped goes on where "
        "it stopped.",
    )
    parser.add_argument(
        "--benchmark",
        default="concept-shapes",
        metavar="NAME",
        help="name of the benchmark (default: %(default)s)",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the benchmark's files (concept-shapes needs none)"
    )
    parser.add_argument("--split", default="test", help="split of the benchmark (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="S",
        help="seed by which references are drawn for benchmarks of files (default: %(default)s)",
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N samples")
    parser.add_argument(
        "--protocol",
        default="standard",
        metavar="P",
        help="how masks are compared: standard or paper (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics",
        default="miou,giou,ciou,mae,ber,mdice",
        metavar="M,M",
        help="metrics of masks; also f_w and s_measure, with conceptseg-hf[eval] (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="B",
        help="samples at a time (default: %(default)s)",
    )
    add_model_options(parser)
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder of the results (default: evaluation_output/BENCHMARK-SPLIT-ROUTER)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb."""
    check_model(arguments.model)
    from conceptseg_hf.data import load_benchmark
    from conceptseg_hf.evaluation import evaluate

    files = {}
    if arguments.root is not None:
        files = {"root": arguments.root, "limit": arguments.limit, "seed": arguments.seed}
    benchmark = as_bad_input(load_benchmark, arguments.benchmark, split=arguments.split, **files)
    model, processor = load_model(arguments)
    name = f"{arguments.benchmark}-{arguments.split}-{arguments.router}"
    folder = make_output_dir(arguments.output_dir or f"evaluation_output/{name}")
    report = as_bad_input(
        evaluate,
        model,
        benchmark,
        processor=processor,
        protocol=arguments.protocol,
        metrics=tuple(arguments.metrics.split(",")),
        router=arguments.router,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        output_dir=folder,
        split=arguments.split,
        progress=True,
    )
    print(report.to_markdown())
    print(folder / "report.md")
    print(report.summary())
    return 0
