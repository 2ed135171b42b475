"""`conceptseg induce`: a concept from marked references, as a file for `conceptseg segment --concept`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import (
    BadInputError,
    add_model_options,
    as_bad_input,
    check_image,
    load_model,
    parse_reference,
    positive_int,
    warn_of_default_model,
)
from .outputs import check_output_file


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "induce",
        help="induce a concept from marked references",
        description="The VLM proposes phrases for what the references have in common, and SAM 3 verifies them on the "
        "references. The file can be applied to other images without the VLM: conceptseg segment IMAGE --concept FILE.",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the concept in words")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="IMG:MASK.png|IMG:x1,y1,x2,y2[;...]",
        help="reference image with the mask or boxes of the concept; can be repeated",
    )
    parser.add_argument(
        "--negative",
        action="append",
        default=[],
        metavar="IMG",
        help="image without the concept, used for the threshold; can be repeated",
    )
    parser.add_argument(
        "--refine", action="store_true", help="also tune tokens in SAM 3's prompt space on the references"
    )
    parser.add_argument(
        "--num-samples",
        type=positive_int,
        default=1,
        metavar="N",
        help="completions per reference (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="output file, such as concept.safetensors"
    )
    add_model_options(parser, router=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    if not arguments.prompt.strip():
        raise BadInputError('--prompt is empty; give the concept in words, such as --prompt "scratch".')
    if not arguments.reference:
        raise BadInputError("there is no --reference; give at least one image with its mask or boxes.")
    parsed = [parse_reference(text) for text in arguments.reference]
    negatives = [check_image(path) for path in arguments.negative]
    check_output_file(arguments.out, "--out")
    model, processor = load_model(arguments)

    from conceptseg_hf import induce

    references = [item.to_reference() for item in parsed]
    concept = as_bad_input(
        induce,
        model,
        processor,
        arguments.prompt,
        references,
        negatives,
        num_samples=arguments.num_samples,
        refine=arguments.refine,
        seed=arguments.seed,
        progress=True,
    )
    as_bad_input(concept.save, arguments.out)
    print(concept.summary([Path(item.image).name for item in parsed]))
    for row in concept.scores[:5]:
        print(f"  {row.score:.2f}  {row.name}")
    print(arguments.out)
    processor.warn_of_unknown_words(arguments.prompt)
    warn_of_default_model(arguments)
    return 0
