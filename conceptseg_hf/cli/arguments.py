"""Arguments shared by the subcommands: common options, references, and loading of the model."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, Reference
    from conceptseg_hf.boxes import Box

# Copy of conceptseg_hf.router.ROUTER_MODES, which requires torch. A test checks that both are equal.
ROUTERS = ("adaptive", "sam_only", "full_reasoning")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Copy of conceptseg_hf.vlm_engines.VLM_ENGINES.
VLM_ENGINES = ("transformers", "vllm")
# Names in conceptseg_hf.profiles.PROFILES, copied for the same reason.
PROFILES = ("paper", "released")
# Names of conceptseg_hf.shipped.CHECKPOINTS.
CHECKPOINTS = ("nano", "mini", "coprs-nano")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SMALL_MODEL = 50_000_000  # parameters
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class BadInputError(Exception):
    """The user's input is invalid; the message is one sentence with the input, the fault and the remedy."""


@dataclass(frozen=True)
class ReferenceArgument:
    """A parsed `--reference`: an image with a mask, a box (x1, y1, x2, y2) in pixels, several boxes, or neither."""

    image: str
    mask: str | None = None
    box: Box | None = None
    boxes: tuple[Box, ...] | None = None

    def to_reference(self) -> Reference:
        """Return the reference; requires the packages of the model."""
        from conceptseg_hf import Reference

        return Reference(self.image, mask=self.mask, box=self.box, boxes=self.boxes)


def add_output_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --output-dir."""
    parser.add_argument(
        "--output-dir", default=default, metavar="DIR", help="output folder (default: %(default)s)"
    )


def add_root_option(parser: argparse.ArgumentParser, what: str = "dataset folder") -> None:
    """Add --root, whose values are parsed by `parse_roots`."""
    parser.add_argument(
        "--root",
        action="append",
        metavar="[NAME=]DIR",
        help=f"{what}; NAME=DIR sets the folder of a single benchmark (can be repeated; not needed for "
        "concept-shapes)",
    )


def parse_roots(given: Sequence[str] | None) -> dict[str, str]:
    """Parse the values of --root to a dictionary of folders for `load_benchmarks`.

    Raises:
        BadInputError: If two folders are given for the same benchmarks.
    """
    from conceptseg_hf.data import SOURCES
    from conceptseg_hf.data.groups import OTHERS

    roots: dict[str, str] = {}
    for text in given or ():
        name, _, folder = text.partition("=")
        name, folder = (name, folder) if name in SOURCES else (OTHERS, text)
        if name in roots:
            raise BadInputError(
                f"--root {text!r} is a second folder for the same benchmarks; give one, and NAME=DIR for the others."
            )
        roots[name] = folder
    return roots


def parse_metrics(given: str | None) -> tuple[str, ...]:
    """Parse --metrics: a list of names, "all", or by default the metrics that need no additional package."""
    from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS

    if given is None:
        return METRICS
    names = tuple(name.strip() for name in given.split(","))
    return (*METRICS, *LIBRARY_METRICS) if names == ("all",) else names


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation: --benchmark, --root, --split, --limit, --protocol, --metrics, --batch-size."""
    parser.add_argument(
        "--benchmark",
        default="concept-shapes",
        metavar="NAME",
        help="a benchmark, a group of the paper's suite (table1: the 20 datasets of Table 1; ci, cd, cr: the datasets "
        "of a level; all: all 23), or a comma-separated list (default: %(default)s)",
    )
    add_root_option(parser)
    parser.add_argument(
        "--split",
        default="test",
        help="split of benchmarks given by name; groups use the splits of the paper (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="use only the first N samples of each benchmark; a run can be resumed with a larger N, not with a "
        "smaller one",
    )
    parser.add_argument(
        "--protocol",
        metavar="P",
        help="protocol of the mask comparison: standard, paper or released (default: that of the profile, or standard)",
    )
    parser.add_argument(
        "--metrics",
        metavar="M,M",
        help="mask metrics, or all (default: all except f_w and s_measure, which need conceptseg-hf[eval])",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="B",
        help="number of samples per batch (default: %(default)s)",
    )


def add_model_options(parser: argparse.ArgumentParser, router: bool = True) -> None:
    """Add --model, --device, --dtype, --vlm-engine and optionally --router."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="name of an embedded checkpoint (nano, mini), folder or hub id (default: nano)",
    )
    parser.add_argument(
        "--device", help="device: cpu, cuda, cuda:1, mps (default: an accelerator if available)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--vlm-engine",
        "--mllm-engine",
        choices=VLM_ENGINES,
        default=VLM_ENGINES[0],
        help="engine that writes the completions of the VLM (default: %(default)s)",
    )
    if router:
        parser.add_argument(
            "--router",
            choices=ROUTERS,
            default="adaptive",
            help="adaptive: SAM 3 alone if its confidence in the prompt is high enough, else reasoning; sam_only, "
            "full_reasoning: always one of them (default: %(default)s)",
        )


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Add --profile."""
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        help="settings of model, processor and evaluation: paper, or released for those of the authors' code "
        "(see docs/weights.md; default: the settings of the checkpoint)",
    )


def add_template_option(parser: argparse.ArgumentParser, default: str = "the checkpoint's") -> None:
    """Add --prompt-template, whose value is loaded by `read_template`."""
    parser.add_argument(
        "--prompt-template",
        metavar="FILE",
        help=f"instruction template of the VLM, as YAML or JSON (default: {default})",
    )


def read_template(path: str | None) -> Any:
    """Load the template of --prompt-template; None if the option is not given.

    Raises:
        BadInputError: If the template cannot be read.
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
    verbose: bool = True,
) -> None:
    """Apply --profile and --prompt-template to a loaded model and its processor.

    Args:
        model: The model.
        processor: Its processor.
        profile: Name of a profile, or None.
        template: A prompt template, or None.
        verbose: Whether to print the changes of the profile to standard error.
    """
    from conceptseg_hf.profiles import apply_profile

    if profile is not None:
        changes = as_bad_input(apply_profile, model, processor, profile)
        changed = ", ".join(f"{name} {after}" for name, (_, after) in changes.items())
        if verbose:
            sys.stderr.write(f"profile {profile}: {changed or 'nothing changes'}\n")
    if template is not None:
        processor.prompt_template = template.to_dict()


def parse_reference(text: str) -> ReferenceArgument:
    """Parse `IMAGE`, `IMAGE:MASK`, `IMAGE:x1,y1,x2,y2` or `IMAGE:x1,y1,x2,y2;x1,y1,x2,y2`.

    Names may contain colons (drive letters, URLs): the string is split at the last colon whose left side is a
    file or URL and whose right side is a box, a file or a URL.

    Raises:
        BadInputError: If the reference cannot be parsed.
    """
    if not text:
        raise BadInputError("--reference is empty; give IMAGE, IMAGE:MASK.png or IMAGE:x1,y1,x2,y2.")
    if _is(text, Path.is_file):
        return ReferenceArgument(text)
    splits = [(text[:i], text[i + 1 :]) for i in range(len(text) - 1, 0, -1) if text[i] == ":"]
    images = [(head, tail) for head, tail in splits if _is_readable(head)]
    for head, tail in images:
        boxes = _parse_boxes(tail)
        if boxes is not None:
            for box in boxes:
                if not (box[0] < box[2] and box[1] < box[3]):
                    numbers = ",".join(f"{number:g}" for number in box)
                    raise BadInputError(
                        f"--reference {head!r}: box {numbers} is empty; give x1,y1,x2,y2 with x1 < x2 and y1 < y2."
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
        path = next((head for head, tail in splits if _parse_boxes(tail) is not None), text)
        raise BadInputError(
            f"--reference {path!r} is not a file; give the path of an image, as IMAGE, IMAGE:MASK.png or "
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
    """Return the path or URL of an image after checking that a path exists.

    Raises:
        BadInputError: If the path is not a file.
    """
    if not _is_readable(path):
        raise BadInputError(f"image {path!r} is not a file; give the path of an image.")
    return path


def check_model(name: str | None) -> None:
    """Check, before importing the package, that a model is an embedded checkpoint, a checkpoint folder or a hub id.

    Raises:
        BadInputError: If it is none of them.
    """
    if name is None:
        return
    is_name = _HUB_ID.fullmatch(name) or name.removeprefix("conceptseg-") in CHECKPOINTS
    if is_name and not _is(name, Path.exists):
        return
    if not _is(name, Path.is_dir):
        raise BadInputError(
            f"model {name!r} is neither a folder nor a hub id; give a checkpoint folder, or an id such as "
            f"owner/name, or one of {', '.join(CHECKPOINTS)}."
        )
    if not _is(f"{name}/config.json", Path.is_file):
        raise BadInputError(
            f"model folder {name!r} has no config.json; give the folder of a ConceptSeg checkpoint."
        )


def load_model(arguments: argparse.Namespace) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
    """Load model and processor according to --model, --device, --dtype and --vlm-engine.

    Raises:
        BadInputError: If the model cannot be loaded, or the engine cannot run it.
    """
    check_model(arguments.model)
    from conceptseg_hf.loading import load_model_and_processor

    hide_bars()
    try:
        model, processor = load_model_and_processor(arguments.model, arguments.device, arguments.dtype)
    except (ValueError, ImportError, OSError) as error:
        reason = _first_sentence(error)
        if arguments.model is not None and not _is(arguments.model, Path.exists):
            reason = f"model {arguments.model!r} is not a local folder and cannot be downloaded from the Hub: {reason}"
        raise BadInputError(reason) from error
    limit_threads(model)
    as_bad_input(model.set_vlm_engine, arguments.vlm_engine, processor)
    return model, processor


def warn_of_default_model(arguments: argparse.Namespace) -> None:
    """Warn that the user's images are segmented by the checkpoint for drawings if no --model is given."""
    if arguments.model is None:
        warnings.warn(
            "no --model is given, and the default, nano, only knows drawn shapes; use --model mini for some kinds of "
            "photographs, a folder or Hub id of converted weights for others, or --model nano to hide this warning.",
            stacklevel=2,
        )


def limit_threads(model: ConceptSegForSegmentation) -> None:
    """Limit a small model on the CPU to one thread.

    For small layers, the synchronization of threads takes longer than the computation.
    """
    if model.device.type == "cpu" and model.num_parameters() < _SMALL_MODEL:
        import torch

        torch.set_num_threads(1)


def hide_bars() -> None:
    """Hide the progress bars of libraries in pipes and logs."""
    from conceptseg_hf.progress import hide_bars_in_pipes

    hide_bars_in_pipes()


def silence_output() -> None:
    """Silence warnings and progress bars in processes other than the main process; errors are still printed."""
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()


def as_bad_input(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function and convert its ValueError, ImportError or OSError to a BadInputError."""
    try:
        return function(*args, **kwargs)
    except (ValueError, ImportError, OSError) as error:
        raise BadInputError(_first_sentence(error)) from error


def installed_version(package: str) -> str:
    """Return the version of a package without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def positive_int(text: str) -> int:
    """Parse a positive integer; used as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error message; errors of Transformers can have several paragraphs."""
    if isinstance(error, OSError) and error.strerror:
        return os_error_sentence(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[^.][.!?]) (?=[A-Z])", text)[0]


def os_error_sentence(error: OSError) -> str:
    """Return a one-sentence message for an error of the operating system."""
    if not error.strerror:  # raised with a complete message
        return _first_sentence(error)
    what = "a file" if error.filename is None else repr(os.fspath(error.filename))
    if error.errno in _FULL:
        return f"{what} cannot be written: {error.strerror}; free some disk space, or give another folder."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what} cannot be used: {error.strerror}; give another folder, or change its permissions."
    return f"{what} cannot be used: {error.strerror}; give another path."


def _parse_boxes(text: str) -> tuple[Box, ...] | None:
    """Parse one box or several boxes separated by semicolons; None if any of them is invalid."""
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
    """Call `Path.is_file` or a similar method; False for invalid paths."""
    try:
        return kind(Path(name))
    except (OSError, ValueError):  # too long, or contains a null byte
        return False


def is_url(name: str) -> bool:
    """Whether an image is a URL instead of a path."""
    return re.match(r"https?://[^/]", name) is not None
