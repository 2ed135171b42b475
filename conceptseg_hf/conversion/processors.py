"""Tokenizers and image processors beside the weights: theirs become a `ConceptSegProcessor`, and back."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BaseImageProcessor, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..configuration_conceptseg import ConceptSegConfig
from ..errors import one_line
from ..processing_conceptseg import ConceptSegProcessor
from ..processor_settings import SWITCHES
from ..profiles import PROFILES
from .errors import ConversionError
from .sources import read_json
from .writer import write_json

RELEASED_SETTINGS = {"canvas_size": 600, "coordinate_scale": 600.0, "sam_text_length": 32}
"""The released weights write boxes as whole pixels of a 600 x 600 canvas."""
_SYSTEM = "You are a helpful assistant. "  # theirs ends with a space
_KEPT = ("canvas_size", "coordinate_scale", "sam_text_length", "prompt_template")

BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
"""Meta's file of SAM 3's vocabulary, in the folder `assets` of its repository."""

_TEMPLATE_NAME = "chat_template.json"  # of processors before Transformers had chat_template.jinja
_PROCESSOR_CLASS = "Qwen2_5_VLProcessor"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_BPE_MERGES = 49152 - 256 - 2  # CLIP's vocabulary, without bytes and special tokens


def released_settings(profile: str) -> dict[str, Any]:
    """Arguments of `ConceptSegProcessor` for released weights under a profile."""
    settings = dict(PROFILES[profile].processor)
    settings["prompt_template"] = {**settings["prompt_template"], "system": _SYSTEM}
    return RELEASED_SETTINGS | settings


def join_processors(
    checkpoint: Path, sam: Path, config: ConceptSegConfig, settings: Mapping[str, Any]
) -> ConceptSegProcessor:
    """Our processor from the files beside the VLM's and SAM 3's weights.

    Args:
        checkpoint: Folder of the authors' checkpoint.
        sam: Folder of SAM 3, of one of our checkpoints, or Meta's `sam3.pt` with its vocabulary beside it.
        config: Our configuration; where a folder has no image processor, it says the sizes.
        settings: Arguments of `ConceptSegProcessor`.

    Raises:
        ConversionError: If a tokenizer is missing or a file cannot be read.
    """
    from transformers import Qwen2VLImageProcessor, Sam3ImageProcessor  # they need torchvision

    vision = config.vlm_config.vision_config
    sam_size = config.sam_config.vision_config.backbone_config.image_size
    sam_folder = sam if sam.is_dir() else sam.parent
    try:
        return ConceptSegProcessor(
            image_processor=_image_processor(
                Qwen2VLImageProcessor,
                checkpoint,
                patch_size=vision.patch_size,
                merge_size=vision.spatial_merge_size,
                temporal_patch_size=vision.temporal_patch_size,
            ),
            tokenizer=_tokenizer(checkpoint),
            **_sam_parts(sam_folder, Sam3ImageProcessor, sam_size),
            chat_template=_chat_template(checkpoint),
            **settings,
        )
    except ConversionError:
        raise
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        reason = one_line(error)[:300]
        raise ConversionError(
            f"the tokenizers and image processors of {str(checkpoint)!r} and {str(sam)!r} do not make a processor "
            f"({reason}); download those folders again."
        ) from error


def save_original_processor(folder: Path, target: Path) -> dict[str, Any]:
    """Saves the VLM's part of our processor as the authors' code reads it.

    Args:
        folder: A checkpoint of ours.
        target: Where to.

    Returns:
        The settings of our processor that such a folder has no place for.
    """
    processor = ConceptSegProcessor.from_pretrained(folder)
    plain = processor.vlm_processor()
    plain.tokenizer.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    _rewrite_for_older_releases(target, plain.chat_template)
    copy_generation_config(folder, target)
    changed = (name for name, value in SWITCHES.items() if getattr(processor, name) != value)
    return {name: getattr(processor, name) for name in (*_KEPT, *changed)}


def _rewrite_for_older_releases(folder: Path, chat_template: str | dict[str, str] | None) -> None:
    """Says what was saved in the words of Transformers 4, which the authors' code runs on."""
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    special = content.pop("extra_special_tokens", None)
    if isinstance(special, list):  # a list there stops Transformers 4
        content["additional_special_tokens"] = special
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content |= {"processor_class": _PROCESSOR_CLASS, "chat_template": chat_template}
    write_json(path, content)
    write_json(folder / _TEMPLATE_NAME, {"chat_template": chat_template})
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    path = folder / "preprocessor_config.json"
    content = read_json(path)
    size = content.get("size") or {}
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    write_json(path, content | limits | {"processor_class": _PROCESSOR_CLASS})


def copy_generation_config(folder: Path, target: Path) -> None:
    """Copies the VLM's generation settings, if there are any."""
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
        shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")


def _image_processor(kind: type[BaseImageProcessor], folder: Path, **sizes: Any) -> BaseImageProcessor:
    """From its file, or with the sizes that the model's configuration says."""
    if any((folder / name).is_file() for name in _IMAGE_FILES):
        return kind.from_pretrained(folder)
    return kind(**sizes)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConversionError(
            f"folder {str(folder)!r} has no tokenizer ({_TOKENIZER_FILES[0]}); give a complete folder."
        )
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _sam_parts(folder: Path, kind: type[BaseImageProcessor], image_size: int) -> dict[str, Any]:
    if (folder / "sam_tokenizer").is_dir():  # one of our checkpoints
        processor = ConceptSegProcessor.from_pretrained(folder)
        return {
            "sam_image_processor": processor.sam_image_processor,
            "sam_tokenizer": processor.sam_tokenizer,
        }
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and not (folder / BPE_NAME).is_file():
        raise ConversionError(
            f"folder {str(folder)!r} has no tokenizer of SAM 3; put {BPE_NAME} (folder assets of Meta's repository) "
            "beside sam3.pt, or give the folder of facebook/sam3."
        )
    return {
        "sam_image_processor": _image_processor(
            kind, folder, size={"height": image_size, "width": image_size}
        ),
        "sam_tokenizer": _tokenizer(folder) if has_tokenizer else read_bpe(folder / BPE_NAME),
    }


def read_bpe(path: Path) -> CLIPTokenizer:
    """SAM 3's tokenizer from the vocabulary that Meta ships: bytes, bytes that end words, merges, two marks."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 1 + _BPE_MERGES]]
        alphabet = list(bytes_to_unicode().values())
        marks = ("<|startoftext|>", "<|endoftext|>")
        tokens = [*alphabet, *(token + "</w>" for token in alphabet), *map("".join, merges), *marks]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Transformers takes pairs, but its annotation does not know them.
        return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ConversionError(
            f"vocabulary {str(path)!r} cannot be read ({error}); download it again."
        ) from error


def _chat_template(folder: Path) -> str | None:
    """The template of processors saved before it had a file of its own; else the tokenizer's is used."""
    path = folder / _TEMPLATE_NAME
    return read_json(path).get("chat_template") if path.is_file() else None
