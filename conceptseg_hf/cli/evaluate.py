"""`conceptseg evaluate`: evaluation of a checkpoint on benchmarks, with records and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import (
    BadInputError,
    add_benchmark_options,
    add_model_options,
    add_profile_option,
    add_template_option,
    as_bad_input,
    check_model,
    load_model,
    parse_metrics,
    parse_roots,
    read_template,
    set_profile,
    silence_output,
)
from .outputs import check_output_dir, check_output_file, explain_resuming, folder_name

FILES = (
    "records.jsonl",
    "settings.json",
    "report.md",
    "report.json",
    "report.csv",
    "gallery.html",
    "heatmaps.html",
)


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "evaluate",
        help="evaluate a checkpoint on benchmarks",
        description="Writes records.jsonl and the report. An interrupted run is resumed. To distribute the samples "
        "over several processes, use accelerate launch --num_processes N -m conceptseg_hf.cli evaluate ... on GPUs, or "
        "torchrun --nproc_per_node N -m conceptseg_hf.cli evaluate ... on any device.",
    )
    add_benchmark_options(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="S",
        help="random seed of the reference selection (default: %(default)s)",
    )
    parser.add_argument(
        "--groups",
        metavar="G,G",
        help="groups of concept-shapes: those of Table 1 (default), or additionally: which one, hidden rule",
    )
    parser.add_argument(
        "--routing-regret",
        action="store_true",
        help="also run the route that was not selected, and report the regret of the router",
    )
    parser.add_argument(
        "--concept", metavar="FILE", help="concept of `conceptseg induce` that is applied to all samples"
    )
    parser.add_argument(
        "--judgements",
        metavar="FILE",
        help="correctness of each think and rule, as .csv or .jsonl (sample_id, think, rule), for the eight outcomes "
        "of the paper's appendix J; or exact-rule to compare rules with the ground truth, if the benchmark has any",
    )
    parser.add_argument(
        "--annotation-sheet",
        metavar="FILE",
        help="write the completions to a new .csv file for annotation, which can then be given to --judgements",
    )
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        help="leave samples out of the report: a file of conceptseg data check --duplicates, or one sample id per line",
    )
    add_model_options(parser)
    add_profile_option(parser)
    add_template_option(parser)
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="output folder (default: evaluation_output/BENCHMARK[-GROUPS]-SPLIT-ROUTER)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    check_model(arguments.model)
    if arguments.concept is not None and not Path(arguments.concept).is_file():
        raise BadInputError(
            f"concept {arguments.concept!r} is not a file; give one that `conceptseg induce` wrote."
        )
    sheet = arguments.annotation_sheet
    if sheet is not None:
        check_output_file(sheet, "--annotation-sheet")
        if Path(sheet).exists():
            raise BadInputError(
                f"--annotation-sheet {sheet!r} already exists and may contain annotations; give another name."
            )
    groups = None if arguments.groups is None else [name.strip() for name in arguments.groups.split(",")]
    name = "-".join(
        [
            folder_name(arguments.benchmark),
            *([] if groups is None else [folder_name(arguments.groups)]),
            arguments.split,
            arguments.router,
        ]
    )
    folder = check_output_dir(arguments.output_dir or f"evaluation_output/{name}", *FILES)
    from conceptseg_hf.data import load_benchmarks
    from conceptseg_hf.data.duplicates import read_sample_ids
    from conceptseg_hf.evaluation import evaluate
    from conceptseg_hf.evaluation.distributed import join_processes
    from conceptseg_hf.evaluation.reporting.decomposition import write_annotation_sheet
    from conceptseg_hf.loading import profile_of
    from conceptseg_hf.profiles import get_profile

    exclude = [] if arguments.exclude is None else as_bad_input(read_sample_ids, arguments.exclude)
    template = read_template(arguments.prompt_template)
    profile = as_bad_input(get_profile, arguments.profile or profile_of(arguments.model) or "paper")
    processes = join_processes()
    if not processes.is_main:
        silence_output()
    samples = as_bad_input(
        load_benchmarks,
        arguments.benchmark,
        root=parse_roots(arguments.root),
        split=arguments.split,
        limit=arguments.limit,
        seed=arguments.seed,
        loader=profile.loader,
        groups=groups,
    )
    model, processor = load_model(arguments)
    set_profile(model, processor, arguments.profile, template, verbose=processes.is_main)
    with explain_resuming(folder):
        report = as_bad_input(
            evaluate,
            model,
            samples,
            processor=processor,
            protocol=arguments.protocol,
            metrics=parse_metrics(arguments.metrics),
            router=arguments.router,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            output_dir=folder,
            routing_regret=arguments.routing_regret,
            judgements=arguments.judgements,
            exclude=exclude,
            concept=arguments.concept,
            progress=True,
        )
    if processes.is_main:
        print(report.to_markdown())
        if sheet is not None:
            as_bad_input(write_annotation_sheet, report.records, sheet)
            print(sheet)
        print(folder / "report.md")
        print(report.summary())
    processes.leave()
    return 0
