"""`conceptseg batch`: a concept or a prompt applied to many images, on one device or a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .arguments import (
    BadInputError,
    add_model_options,
    add_profile_option,
    add_template_option,
    as_bad_input,
    check_model,
    hide_bars,
    parse_reference,
    positive_int,
    read_template,
    warn_of_default_model,
)
from .outputs import check_output_dir, explain_resuming

if TYPE_CHECKING:
    from conceptseg_hf.batch import BatchResult

# Copies of conceptseg_hf.batch.run.ENGINES and conceptseg_hf.batch.exports.FORMATS, which require torch. A test checks
# that they are equal.
ENGINES = ("local", "ray")
FORMATS = ("parquet", "coco", "png")

_SHOWN_ERRORS = 10


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "batch",
        help="segment a concept in many images",
        description="Writes one row per image to Parquet files in DIR/results: mask (COCO run-length encoding), boxes, "
        "scores, route, rule, answer, and an error for an image that cannot be read. The same command continues an "
        "interrupted job.",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="FOLDER|GLOB|LIST.txt|TABLE.parquet|hf://...",
        help="the images: a folder, a glob in quotes, a file with one path or URL per line, a table with a column of "
        "paths or encoded images, or hf://datasets/OWNER/NAME[@REVISION][/FOLDER]",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="column of a table with the images (default: found by name)"
    )
    parser.add_argument(
        "--concept", metavar="FILE", help="concept of `conceptseg induce`, applied by SAM 3 without the VLM"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the concept in words (default: the prompt of --concept)"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="IMG[:MASK.png|:x1,y1,x2,y2[;...]]",
        help="reference image for images on which the VLM reasons; can be repeated up to nine times",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="local: one device; ray: a Ray cluster, that of the environment variable RAY_ADDRESS or one that is "
        "started on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--num-workers",
        type=positive_int,
        metavar="N",
        help="models on the Ray cluster (default: one per GPU)",
    )
    parser.add_argument(
        "--num-gpus", type=positive_int, metavar="N", help="GPUs of the Ray cluster to use (default: all)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="parquet",
        help="coco: also write DIR/coco.json; png: also write the masks to DIR/masks (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="B",
        help="images per batch, of which a killed job loses at most one per worker (default: %(default)s)",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="compute batches with failed images again"
    )
    add_model_options(parser)
    add_profile_option(parser)
    add_template_option(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive_int, metavar="N", help="maximum number of generated tokens"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    if arguments.prompt is None and arguments.concept is None:
        raise BadInputError(
            '--prompt and --concept are missing; give a concept file, or words such as --prompt "red circle".'
        )
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise BadInputError('--prompt is empty; give the concept in words, such as --prompt "red circle".')
    if arguments.engine == "local" and (arguments.num_workers or arguments.num_gpus):
        raise BadInputError("--num-workers and --num-gpus are options of --engine ray; add it, or omit them.")
    parsed = [parse_reference(text) for text in arguments.reference]
    check_model(arguments.model)
    folder = check_output_dir(arguments.out, "settings.json", option="--out")
    template = read_template(arguments.prompt_template)

    from conceptseg_hf.batch import BatchJob, open_images, run_batch
    from conceptseg_hf.batch.job import read_references
    from conceptseg_hf.concept_prompt import as_concept

    hide_bars()
    job = as_bad_input(
        BatchJob,
        images=as_bad_input(open_images, arguments.images, arguments.column),
        prompt=arguments.prompt,
        concept=None if arguments.concept is None else as_bad_input(as_concept, arguments.concept),
        references=as_bad_input(read_references, [item.to_reference() for item in parsed]),
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        router=arguments.router,
        max_new_tokens=arguments.max_new_tokens,
        profile=arguments.profile,
        template=None if template is None else template.to_dict(),
        vlm_engine=arguments.vlm_engine,
        batch_size=arguments.batch_size,
    )
    with explain_resuming(folder):
        report = as_bad_input(
            run_batch,
            job,
            folder,
            engine=arguments.engine,
            format=arguments.format,
            num_workers=arguments.num_workers,
            num_gpus=arguments.num_gpus,
            retry_failed=arguments.retry_failed,
            progress=True,
            on_batch=_ErrorLines(),
        )
    print(report.to_table())
    for path in report.outputs:
        print(path)
    warn_of_default_model(arguments)
    if report.errors == report.images:
        raise BadInputError(f"no image could be segmented; the first one: {report.first_error}")
    return 0


class _ErrorLines:
    """Prints the errors of the first failed images; all errors are in the results."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, result: BatchResult) -> None:
        from conceptseg_hf.progress import print_line

        for name, error in result.errors:
            self._count += 1
            if self._count <= _SHOWN_ERRORS:
                print_line(error if name in error else f"{name}: {error}", sys.stderr)
            elif self._count == _SHOWN_ERRORS + 1:
                print_line("further errors are only in the results.", sys.stderr)
