"""`conceptseg ablate`: evaluation of a checkpoint under variants of one setting."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import (
    BadInputError,
    add_benchmark_options,
    add_model_options,
    add_profile_option,
    as_bad_input,
    check_model,
    load_model,
    parse_metrics,
    parse_roots,
    silence_output,
)
from .outputs import check_output_dir, explain_resuming, folder_name

# Copy of ablation.ablation_names(), which requires torch. A test checks that both are equal.
CONFIGS = ("router", "prompt", "references", "reference_seeds", "concept_queries")
FILES = ("ablation.md", "ablation.json", "ablation.csv")


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "ablate",
        help="evaluate a checkpoint under several settings and compare them",
        description="Evaluates every variant of an ablation in a separate folder, and writes ablation.md, "
        "ablation.json and ablation.csv with paired differences to the baseline. An interrupted run is resumed.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME_OR_YAML",
        help=f"{', '.join(CONFIGS)}, or a YAML file of the same format",
    )
    add_benchmark_options(parser)
    add_model_options(parser, router=False)
    add_profile_option(parser)
    parser.add_argument(
        "--variant-model",
        action="append",
        default=[],
        metavar="VARIANT=PATH_OR_ID",
        help="checkpoint of a variant, if it differs from --model (can be repeated)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="output folder (default: ablation_output/CONFIG-BENCHMARK-SPLIT)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    check_model(arguments.model)
    models = dict(_variant_model(text) for text in arguments.variant_model)
    from conceptseg_hf.data import load_benchmarks
    from conceptseg_hf.evaluation.distributed import join_processes
    from conceptseg_hf.evaluation.running.ablation import ablate, load_ablation

    ablation = as_bad_input(load_ablation, arguments.config)
    name = f"{ablation.name}-{folder_name(arguments.benchmark)}-{arguments.split}"
    folder = check_output_dir(arguments.output_dir or f"ablation_output/{name}", *FILES)
    data = {"root": parse_roots(arguments.root), "split": arguments.split, "limit": arguments.limit}
    as_bad_input(load_benchmarks, arguments.benchmark, **data)  # check the data before loading a large model
    processes = join_processes()
    if not processes.is_main:
        silence_output()
    model, processor = load_model(arguments)
    with explain_resuming(folder):
        report = as_bad_input(
            ablate,
            ablation,
            model,
            folder,
            benchmark=arguments.benchmark,
            processor=processor,
            models=models,
            **data,
            protocol=arguments.protocol,
            metrics=parse_metrics(arguments.metrics),
            batch_size=arguments.batch_size,
            profile=arguments.profile,
            progress=True,
        )
    if processes.is_main:
        print(report.to_markdown())
        print(folder / "ablation.md")
    processes.leave()
    return 0


def _variant_model(text: str) -> tuple[str, str]:
    variant, equals, path = text.rpartition("=")
    if not (variant and equals and path):
        raise BadInputError(f"--variant-model is {text!r}; give VARIANT=PATH_OR_ID.")
    check_model(path)
    return variant.strip(), path
