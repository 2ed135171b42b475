"""`conceptseg segment`: segmentation of one image with a prompt and optional references."""

from __future__ import annotations

import argparse
import itertools
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import (
    BadInputError,
    add_model_options,
    add_output_option,
    add_profile_option,
    add_template_option,
    as_bad_input,
    check_image,
    is_url,
    load_model,
    parse_reference,
    positive_int,
    read_template,
    set_profile,
    warn_of_default_model,
)
from .outputs import check_output_dir, shorten_name

_ENDINGS = (".json", "_mask.png", "_overlay.png", "_heatmap.png")
_RESERVED = len("-9999_heatmap.png")


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "segment",
        help="segment a concept in one image",
        description="Writes NAME_mask.png, NAME_overlay.png (references | image with predicted box | heatmap | mask), "
        "NAME.json, and with --heatmap NAME_heatmap.png. NAME is the file name of the image without extension. If "
        "these files exist and are not earlier results of the same image, NAME-2, NAME-3 and so on are used. A very "
        "long NAME is shortened.",
    )
    parser.extra_arguments_hint = "; it takes one image, use `conceptseg batch` for several"
    parser.add_argument("image", metavar="IMAGE", help="path or URL of the image")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help='the concept, such as "red circle" or "the odd one out" (default: the prompt of --concept)',
    )
    parser.add_argument(
        "--concept", metavar="FILE", help="concept of `conceptseg induce`, applied by SAM 3 without the VLM"
    )
    parser.add_argument(
        "--rule",
        metavar="TEXT",
        help='visual rule, such as "the striped object", that the VLM applies instead of inducing one',
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="IMG[:MASK.png|:x1,y1,x2,y2[;x1,y1,x2,y2...]]",
        help="reference image that shows the concept, optionally with a mask or boxes (in pixels); can be repeated up "
        "to nine times",
    )
    add_model_options(parser)
    add_profile_option(parser)
    add_template_option(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive_int, metavar="N", help="maximum number of generated tokens"
    )
    parser.add_argument(
        "--heatmap",
        action="store_true",
        help="also write the heatmap (0 to 255 for probabilities of 0 to 1): with a CoPRS checkpoint the positional "
        "prior, otherwise the mask probabilities",
    )
    add_output_option(parser, "conceptseg_output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    image = check_image(arguments.image)
    parsed = [parse_reference(text) for text in arguments.reference]
    if arguments.prompt is None and arguments.concept is None:
        raise BadInputError(
            '--prompt is missing; give the concept to segment, such as --prompt "red circle".'
        )
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise BadInputError('--prompt is empty; give the concept to segment, such as --prompt "red circle".')
    if arguments.rule is not None and not arguments.rule.strip():
        raise BadInputError('--rule is empty; give a visual rule, such as --rule "the striped object".')
    if arguments.concept is not None and not Path(arguments.concept).is_file():
        raise BadInputError(
            f"concept {arguments.concept!r} is not a file; give one that `conceptseg induce` wrote."
        )
    folder = Path(arguments.output_dir)
    inputs = [name for item in parsed for name in (item.image, item.mask) if name is not None]
    json_path, *image_paths = _free_paths(folder, image, inputs)
    paths = dict(zip(("mask", "overlay", "heatmap"), image_paths, strict=True))
    if not arguments.heatmap:
        del paths["heatmap"]
    check_output_dir(folder, *(path.name for path in (*paths.values(), json_path)))
    template = read_template(arguments.prompt_template)
    model, processor = load_model(arguments)
    set_profile(model, processor, arguments.profile, template)

    from conceptseg_hf.concept_prompt import as_concept
    from conceptseg_hf.images import load_image, probabilities_to_image
    from conceptseg_hf.visualization import caption_of, panel
    from conceptseg_hf.writing import image_bytes, json_text, write_files

    references = [item.to_reference() for item in parsed]
    concept = None if arguments.concept is None else as_bad_input(as_concept, arguments.concept)
    prompt = arguments.prompt if concept is None else arguments.prompt or concept.prompt
    sample = as_bad_input(processor.prepare, image, prompt, references, lazy=True)
    generation = {"max_new_tokens": arguments.max_new_tokens} if arguments.max_new_tokens else None
    result = as_bad_input(
        model.segment,
        [sample],
        processor=processor,
        router=arguments.router,
        generation_config=generation,
        concept=concept,
        rule=arguments.rule,
        return_heatmap=arguments.heatmap,
    )[0]
    if result.error is not None or result.mask is None:
        raise BadInputError(result.error)
    check_box, index = result.check, result.check_reference
    check = None if check_box is None or index is None else (index, check_box)
    figure = panel(
        load_image(image),
        result.mask,
        references=references,
        box=result.box,
        check=check,
        caption=caption_of(result, prompt),
        mosaic_settings=processor.mosaic_settings,
        heatmap=result.heatmap,
    )
    record = {
        "image": _resolved(image),
        "prompt": prompt,
        **({} if concept is None else {"concept": arguments.concept}),
        **({} if arguments.rule is None else {"given_rule": arguments.rule}),
        "references": arguments.reference,
        "router": arguments.router,
        **({} if model.config.profile is None else {"profile": model.config.profile}),
        **({} if model.vlm_engine is None else {"vlm_engine": model.vlm_engine.name}),
    }
    record |= {key: value for key, value in result.to_dict().items() if key not in ("mask", "heatmap")}
    record |= {key: path.name for key, path in paths.items()}
    # The JSON file is written first, because it identifies the image that the other files belong to.
    contents = {
        json_path: json_text(record, indent=2) + "\n",
        paths["mask"]: image_bytes(result.mask),
        paths["overlay"]: image_bytes(figure),
    }
    if result.heatmap is not None:
        contents[paths["heatmap"]] = image_bytes(probabilities_to_image(result.heatmap))
    as_bad_input(write_files, contents)

    presence = "" if result.decode_presence is None else f"presence {result.decode_presence:.2f}, "
    coverage = sum(result.mask.histogram()[128:]) / (result.mask.width * result.mask.height)
    print(
        f"{result.route}: {result.label!r}, score {result.score:.2f}, {presence}{coverage:.1%} of the image"
    )
    for path in (*paths.values(), json_path):
        print(path)
    if concept is None:
        processor.warn_of_unknown_words(prompt)
    warn_of_default_model(arguments)
    return 0


def _free_paths(folder: Path, image: str, inputs: Sequence[str]) -> list[Path]:
    """Return the paths of JSON, mask and overlay, named after the image or the first unused of stem-2, stem-3, ..."""
    stem = _file_stem(image)
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    candidates = ([folder / f"{name}{end}" for end in _ENDINGS] for name in names)
    return next(paths for paths in candidates if _are_free(paths, image, inputs))


def _are_free(paths: Sequence[Path], image: str, inputs: Sequence[str]) -> bool:
    """Whether the paths do not exist, or are earlier results of this image and none of them is an input now."""
    if not any(map(_is_taken, paths)):
        return True
    if {_resolved(name) for name in (image, *inputs)} & {_resolved(str(path)) for path in paths}:
        return False
    try:
        return _resolved(json.loads(paths[0].read_text(encoding="utf-8"))["image"]) == _resolved(image)
    except (OSError, ValueError, LookupError, TypeError):  # not a file written by this command
        return False


def _is_taken(path: Path) -> bool:
    """Whether a path exists; empty files, which earlier versions left on a full disk, are ignored."""
    try:
        status = path.lstat()
    except (OSError, ValueError):  # an invalid name, which `check_output_dir` reports
        return False
    return status.st_size > 0 or not stat.S_ISREG(status.st_mode)


def _resolved(image: str) -> str:
    """Resolve a path relative to the working directory; URLs are returned unchanged."""
    return image if is_url(image) else str(Path(image).resolve())


def _file_stem(image: str) -> str:
    """Return the file name of an image or URL without extension, short enough for the names of all results."""
    stem = Path(image.split("?")[0].rstrip("/")).stem
    return shorten_name(stem, _RESERVED) if stem.strip(".") else "image"
