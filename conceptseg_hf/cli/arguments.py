"""What the subcommands' arguments have in common: options, references, and how a model is found."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
    from conceptseg_hf.boxes import Box

# conceptseg_hf.router.ROUTER_MODES, which cannot be imported without torch; a test holds the two together.
ROUTERS = ("adaptive", "sam_only", "full_reasoning")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# conceptseg_hf.profiles.PROFILES, likewise.
PROFILES = ("paper", "released")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SMALL_MODEL = 50_000_000  # parameters
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class BadInputError(Exception):
    """The user's input cannot be used; the message is one sentence that names input, fault and remedy."""


@dataclass(frozen=True)
class ReferenceArgument:
    """A `--reference`: an image, and at most one of a mask, a box (x1, y1, x2, y2) in its pixels, and several boxes."""

    image: str
    mask: str | None = None
    box: Box | None = None
    boxes: tuple[Box, ...] | None = None


def add_output_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the option that says where a subcommand writes."""
    parser.add_argument(
        "--output-dir", default=default, metavar="DIR", help="folder of the results (default: %(default)s)"
    )


def add_root_option(parser: argparse.ArgumentParser, what: str = "folder of the files") -> None:
    """Adds --root, which `parse_roots` reads."""
    parser.add_argument(
        "--root",
        action="append",
        metavar="[NAME=]DIR",
        help=f"{what}; NAME=DIR is that of one benchmark where others have another (may be given again; "
        "concept-shapes needs none)",
    )


def parse_roots(given: Sequence[str] | None) -> dict[str, str]:
    """The folders by benchmark, as `load_benchmarks` takes them.

    Raises:
        BadInputError: If a benchmark has two.
    """
    from conceptseg_hf.data import SOURCES
    from conceptseg_hf.data.groups import OTHERS

    roots: dict[str, str] = {}
    for text in given or ():
        name, _, folder = text.partition("=")
        name, folder = (name, folder) if name in SOURCES else (OTHERS, text)
        if name in roots:
            raise BadInputError(
                f"--root {text!r} is a second folder of the same benchmarks; give one, and NAME=DIR for the others."
            )
        roots[name] = folder
    return roots


def parse_metrics(given: str | None) -> tuple[str, ...]:
    """The metrics that --metrics names: some, "all", or those that need no further package."""
    from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS

    if given is None:
        return METRICS
    names = tuple(name.strip() for name in given.split(","))
    return (*METRICS, *LIBRARY_METRICS) if names == ("all",) else names


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which samples are scored, and how: --benchmark, --root, --split, --limit and so on."""
    parser.add_argument(
        "--benchmark",
        default="concept-shapes",
        metavar="NAME",
        help="a benchmark, a group of the paper's suite (table1: the 20 sets of Table 1; ci, cd, cr: the sets of a "
        "level; all: all 23), or several with commas between them (default: %(default)s)",
    )
    add_root_option(parser)
    parser.add_argument(
        "--split",
        default="test",
        help="split of benchmarks given by name; groups have those of the paper (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="only the first N samples of each benchmark; "
        "an output folder goes on with a larger N, not with a smaller one",
    )
    parser.add_argument(
        "--protocol",
        metavar="P",
        help="how masks are compared: standard, paper or released (default: the profile's, or standard)",
    )
    parser.add_argument(
        "--metrics",
        metavar="M,M",
        help="metrics of masks, or all (default: all but f_w and s_measure, which need conceptseg-hf[eval])",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="B",
        help="samples at a time (default: %(default)s)",
    )


def add_model_options(parser: argparse.ArgumentParser, router: bool = True) -> None:
    """Adds --model, --device, --dtype and, if wanted, --router."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="checkpoint folder or hub id (default: the embedded nano checkpoint)",
    )
    parser.add_argument(
        "--device", help="where to run: cpu, cuda, cuda:1, mps (default: an accelerator if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="number format of the weights (default: the checkpoint's)",
    )
    if router:
        parser.add_argument(
            "--router",
            choices=ROUTERS,
            default="adaptive",
            help="adaptive: SAM 3 alone where it is sure enough of the words, else reasoning; or always the "
            "one or the other",
        )


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Adds --profile."""
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        help="settings of model, processor and evaluation: paper, or released: those of the authors' code "
        "(docs/weights.md lists them; default: the checkpoint's own)",
    )


def add_template_option(parser: argparse.ArgumentParser, default: str = "the checkpoint's") -> None:
    """Adds --prompt-template, which `read_template` reads."""
    parser.add_argument(
        "--prompt-template",
        metavar="FILE",
        help=f"instruction of the VLM, as YAML or JSON (default: {default})",
    )


def read_template(path: str | None) -> Any:
    """The template of --prompt-template; None where there is none.

    Raises:
        BadInputError: If it cannot be read.
    """
    if path is None:
        return None
    from conceptseg_hf.prompt_template import load_prompt_template

    return as_bad_input(load_prompt_template, path)


def set_profile(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    profile: str | None,
    template: Any = None,
    tell: bool = True,
) -> None:
    """Gives a loaded model what --profile and --prompt-template say.

    Args:
        model: The model.
        processor: Its processor.
        profile: A profile, or None.
        template: A template, or None.
        tell: Whether to say on standard error what the profile has changed.
    """
    from conceptseg_hf.profiles import apply_profile

    if profile is not None:
        changes = apply_profile(model, processor, profile)
        changed = ", ".join(f"{name} {after}" for name, (_, after) in changes.items())
        if tell:
            sys.stderr.write(f"profile {profile}: {changed or 'nothing changes'}\n")
    if template is not None:
        processor.prompt_template = template.to_dict()


def parse_reference(text: str) -> ReferenceArgument:
    """Reads `IMAGE`, `IMAGE:MASK`, `IMAGE:x1,y1,x2,y2` or `IMAGE:x1,y1,x2,y2;x1,y1,x2,y2`.

    Names may contain colons (drive letters, URLs): the text is cut at the last colon whose left side is a
    file or URL and whose right side is a box, a file or a URL.

    Raises:
        BadInputError: If no reading makes sense.
    """
    if not text:
        raise BadInputError("--reference is empty; give IMAGE, IMAGE:MASK.png or IMAGE:x1,y1,x2,y2.")
    if _is(text, Path.is_file):
        return ReferenceArgument(text)
    cuts = [(text[:i], text[i + 1 :]) for i in range(len(text) - 1, 0, -1) if text[i] == ":"]
    images = [(head, tail) for head, tail in cuts if _is_readable(head)]
    for head, tail in images:
        boxes = _parse_boxes(tail)
        if boxes is not None:
            for box in boxes:
                if not (box[0] < box[2] and box[1] < box[3]):
                    written = ",".join(f"{number:g}" for number in box)
                    raise BadInputError(
                        f"--reference {head!r}: box {written} is empty; give x1,y1,x2,y2 with x1 < x2 and y1 < y2."
                    )
            return (
                ReferenceArgument(head, box=boxes[0])
                if len(boxes) == 1
                else ReferenceArgument(head, boxes=boxes)
            )
        if _is_readable(tail):
            return ReferenceArgument(head, mask=tail)
    if is_url(text):
        return ReferenceArgument(text)
    if not images:
        named = next((head for head, tail in cuts if _parse_boxes(tail) is not None), text)
        raise BadInputError(
            f"--reference {named!r} is not a file; give the path of an image, as IMAGE, IMAGE:MASK.png or "
            "IMAGE:x1,y1,x2,y2."
        )
    head, tail = images[-1]
    if re.fullmatch(r"[\d\s.,;+-]*", tail):
        raise BadInputError(
            f"--reference {head!r}: {tail!r} is not a box; give four numbers x1,y1,x2,y2 in pixels of that "
            "image, and a semicolon between several boxes."
        )
    raise BadInputError(
        f"--reference {head!r}: {tail!r} is neither a mask file nor a box; give MASK.png or x1,y1,x2,y2."
    )


def check_image(path: str) -> str:
    """The path of an image, if it can exist.

    Raises:
        BadInputError: If it names no file.
    """
    if not _is_readable(path):
        raise BadInputError(f"image {path!r} is not a file; give the path of an image.")
    return path


def check_model(name: str | None) -> None:
    """Finds out, before anything is imported, whether a model can exist at all.

    Raises:
        BadInputError: If it is neither a folder with a config.json nor a hub id.
    """
    if name is None or (_HUB_ID.fullmatch(name) and not _is(name, Path.exists)):
        return
    if not _is(name, Path.is_dir):
        raise BadInputError(
            f"model {name!r} is neither a folder nor a hub id; give a checkpoint folder, or an id such as "
            "owner/name."
        )
    if not _is(f"{name}/config.json", Path.is_file):
        raise BadInputError(
            f"model folder {name!r} has no config.json; give the folder of a ConceptSeg checkpoint."
        )


def load_model(arguments: argparse.Namespace) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Loads model and processor as --model, --device and --dtype say.

    Raises:
        BadInputError: If that does not work.
    """
    check_model(arguments.model)
    from conceptseg_hf.loading import load_model_and_processor

    hide_bars()
    try:
        model, processor = load_model_and_processor(arguments.model, arguments.device, arguments.dtype)
    except (ValueError, ImportError, OSError) as error:
        reason = _first_sentence(error)
        if arguments.model is not None and not _is(arguments.model, Path.exists):
            reason = f"model {arguments.model!r} is no folder here, and the hub did not give it: {reason}"
        raise BadInputError(reason) from error
    limit_threads(model)
    return model, processor


def limit_threads(model: ConceptSegForSegmentation) -> None:
    """Leaves a small model on a CPU one thread.

    Its layers are over before threads have met; on a busy machine they wait for each other.
    """
    if model.device.type == "cpu" and model.num_parameters() < _SMALL_MODEL:
        import torch

        torch.set_num_threads(1)


def hide_bars() -> None:
    """Keeps the bars of libraries out of pipes and logs."""
    from conceptseg_hf.progress import hide_bars_in_pipes

    hide_bars_in_pipes()


def be_silent() -> None:
    """Leaves it to the main process to speak of what all see; errors are told all the same."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()


def as_bad_input(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose ValueError, ImportError and OSError speak to the user."""
    try:
        return function(*args, **kwargs)
    except (ValueError, ImportError, OSError) as error:
        raise BadInputError(_first_sentence(error)) from error


def installed_version(package: str) -> str:
    """The version of a package, found without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def positive_int(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _first_sentence(error: Exception) -> str:
    """An error in one sentence; errors of Transformers go on for paragraphs."""
    if isinstance(error, OSError) and error.strerror:
        return os_error_sentence(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[^.][.!?]) (?=[A-Z])", text)[0]


def os_error_sentence(error: OSError) -> str:
    """What the operating system refused, as one sentence."""
    if not error.strerror:  # it was raised with a sentence of its own
        return _first_sentence(error)
    what = "a file" if error.filename is None else repr(os.fspath(error.filename))
    if error.errno in _FULL:
        return f"{what} cannot be written: {error.strerror}; make room there, or give another folder."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what} cannot be used: {error.strerror}; give another folder, or change its permissions."
    return f"{what} cannot be used: {error.strerror}; give another."


def _parse_boxes(text: str) -> tuple[Box, ...] | None:
    """One box or several with semicolons between them; None if one of them is none."""
    boxes: list[Box] = []
    try:
        for box in text.split(";"):
            x1, y1, x2, y2 = map(float, box.split(","))
            boxes.append((x1, y1, x2, y2))
    except ValueError:
        return None
    return tuple(boxes) if all(all(map(math.isfinite, box)) for box in boxes) else None


def _is_readable(name: str) -> bool:
    return is_url(name) or _is(name, Path.is_file)


def _is(name: str, kind: Callable[[Path], bool]) -> bool:
    """`Path.is_file` and its like, for anything a user may type."""
    try:
        return kind(Path(name))
    except (OSError, ValueError):  # longer than a name can be, or with a null byte
        return False


def is_url(name: str) -> bool:
    """Whether an image is fetched and not opened."""
    return re.match(r"https?://[^/]", name) is not None
