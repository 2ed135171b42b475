"""`conceptseg convert`: published weights become one folder for Auto classes, or go back to the authors' layout."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import PROFILES, BadInputError, add_template_option, as_bad_input, read_template
from .outputs import check_output_dir


def add_parser(subcommands: Any) -> None:
    """Adds the subcommand to the command."""
    parser = subcommands.add_parser(
        "convert",
        help="make one checkpoint of published weights, or bring one back to the authors' layout",
        description="Joins a ConceptSeg-R1 checkpoint in the authors' layout and SAM 3 in one folder that "
        "AutoModel and AutoProcessor load. Memory holds one shard at a time.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR_OR_ID",
        help="the authors' checkpoint, such as zhaoyuan666/ConceptSeg-R1-7B (with --to-original: one of ours)",
    )
    parser.add_argument(
        "--sam",
        metavar="DIR_OR_ID",
        help="SAM 3: facebook/sam3, its folder, Meta's sam3.pt, or a checkpoint of ours",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--to-original", action="store_true", help="write the VLM and the CTM in the authors' layout"
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="leave out tensors that are missing, unknown or of another shape, instead of refusing them",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        help="settings that the folder gets: those of the authors' code, or the paper's (docs/weights.md lists them; "
        "default: released)",
    )
    add_template_option(parser, "the profile's")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if arguments.to_original and arguments.sam is not None:
        raise BadInputError(
            "--sam has no use with --to-original: the authors' layout holds no SAM 3; leave it out."
        )
    if not arguments.to_original and arguments.sam is None:
        raise BadInputError("--sam is missing; name SAM 3's weights, such as facebook/sam3.")
    if arguments.to_original and arguments.dry_run:
        raise BadInputError("--dry-run has no use with --to-original; leave one of them out.")
    for option in ("profile", "prompt_template"):
        if arguments.to_original and getattr(arguments, option) is not None:
            raise BadInputError(
                f"--{option.replace('_', '-')} has no use with --to-original, which keeps the settings that there are; "
                "leave it out."
            )
    if arguments.out is None and not arguments.dry_run:
        raise BadInputError("--out is missing; name the folder to make.")
    if not arguments.dry_run:
        check_output_dir(arguments.out, option="--out")

    from conceptseg_hf import conversion
    from conceptseg_hf.progress import hide_bars_in_pipes

    hide_bars_in_pipes()
    template = read_template(arguments.prompt_template)
    options = {"allow_mismatch": arguments.allow_mismatch}
    if arguments.dry_run:
        return _dry_run(as_bad_input(conversion.plan_conversion, arguments.checkpoint, arguments.sam).plan)
    if arguments.to_original:
        folder = as_bad_input(conversion.to_original, arguments.checkpoint, arguments.out, **options)
    else:
        options |= {"profile": arguments.profile, "prompt_template": template}
        folder = as_bad_input(
            conversion.convert, arguments.checkpoint, arguments.sam, arguments.out, **options
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(
        f"{folder}: {size / 1e9:.2f} GB of weights; {conversion.MANIFEST_NAME} has the hashes of their sources"
    )
    return 0


def _dry_run(plan: Any) -> int:
    for part in ("vlm", "ctm", "sam"):
        steps = [step for step in plan.steps if step.target.startswith(f"{part}.")]
        formats = sorted({str(step.dtype).removeprefix("torch.") for step in steps})
        size = sum(step.nbytes for step in steps)
        print(f"{part}  {len(steps):5} tensors  {size / 1e9:7.3f} GB  {', '.join(formats)}")
    print(f"left behind on purpose: {len(plan.ignored)} tensors")
    print("fits" if plan.fits else f"does not fit: {plan.mismatches()}")
    return 0 if plan.fits else 1
