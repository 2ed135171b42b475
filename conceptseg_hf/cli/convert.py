"""`conceptseg convert`: conversion of published weights to a checkpoint for Auto classes, and back."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import PROFILES, BadInputError, add_template_option, as_bad_input, read_template
from .outputs import check_output_dir


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "convert",
        help="convert published weights to a checkpoint, or a checkpoint to the authors' layout",
        description="Combines a ConceptSeg-R1 checkpoint in the authors' layout and SAM 3 in one folder that can be "
        "loaded with AutoModel and AutoProcessor. At most one shard is kept in memory.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR_OR_ID",
        help="the authors' checkpoint, such as zhaoyuan666/ConceptSeg-R1-7B; with --to-original, a converted "
        "checkpoint",
    )
    parser.add_argument(
        "--sam",
        metavar="DIR_OR_ID",
        help="SAM 3: facebook/sam3, its folder, Meta's sam3.pt, or a converted checkpoint",
    )
    parser.add_argument("--out", metavar="DIR", help="output folder")
    parser.add_argument(
        "--to-original", action="store_true", help="write the VLM and the CTM in the authors' layout"
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="skip tensors that are missing, unexpected or have another shape, instead of stopping with an error",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        help="settings of the converted checkpoint: released for those of the authors' code, or paper (see "
        "docs/weights.md; default: released)",
    )
    add_template_option(parser, "that of the profile")
    parser.add_argument(
        "--dry-run", action="store_true", help="print a summary of the conversion without writing files"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    if arguments.to_original and arguments.sam is not None:
        raise BadInputError(
            "--sam cannot be combined with --to-original, because the authors' layout does not contain SAM 3; omit it."
        )
    if not arguments.to_original and arguments.sam is None:
        raise BadInputError("--sam is missing; give the SAM 3 weights, such as facebook/sam3.")
    if arguments.to_original and arguments.dry_run:
        raise BadInputError("--dry-run cannot be combined with --to-original; omit one of them.")
    for option in ("profile", "prompt_template"):
        if arguments.to_original and getattr(arguments, option) is not None:
            raise BadInputError(
                f"--{option.replace('_', '-')} cannot be combined with --to-original, which keeps the settings of the "
                "checkpoint; omit it."
            )
    if arguments.out is None and not arguments.dry_run:
        raise BadInputError("--out is missing; give the output folder.")
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
        f"{folder}: {size / 1e9:.2f} GB of weights; {conversion.MANIFEST_NAME} contains the hashes of the sources"
    )
    return 0


def _dry_run(plan: Any) -> int:
    for part in ("vlm", "ctm", "sam"):
        steps = [step for step in plan.steps if step.target.startswith(f"{part}.")]
        formats = sorted({str(step.dtype).removeprefix("torch.") for step in steps})
        size = sum(step.nbytes for step in steps)
        print(f"{part}  {len(steps):5} tensors  {size / 1e9:7.3f} GB  {', '.join(formats)}")
    print(f"ignored: {len(plan.ignored)} tensors")
    print("fits" if plan.fits else f"does not fit: {plan.mismatches()}")
    return 0 if plan.fits else 1
