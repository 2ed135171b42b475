"""Conversion of tokenizers and image processors to a `ConceptSegProcessor`, and back."""

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
from ..processor_settings import OPTIONAL_SETTINGS
from ..profiles import PROFILES
from .errors import ConversionError
from .sources import read_json
from .writer import write_json

RELEASED_SETTINGS = {"canvas_size": 600, "coordinate_scale": 600.0, "sam_text_length": 32}
"""Settings of the released weights, which predict boxes in integer pixels of a 600 x 600 canvas."""
_SYSTEM = "You are a helpful assistant. "  # with the trailing space of the authors' code
_KEPT = ("canvas_size", "coordinate_scale", "sam_text_length", "prompt_template")

BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
"""Meta's vocabulary file of SAM 3, in the folder `assets` of its repository."""

_TEMPLATE_NAME = "chat_template.json"  # used by Transformers before chat_template.jinja
_PROCESSOR_CLASS = "Qwen2_5_VLProcessor"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_BPE_MERGES = 49152 - 256 - 2  # CLIP vocabulary without byte tokens and special tokens


def released_settings(profile: str) -> dict[str, Any]:
    """Return the arguments of `ConceptSegProcessor` for the released weights with a profile."""
    settings = dict(PROFILES[profile].processor)
    settings["prompt_template"] = {**settings["prompt_template"], "system": _SYSTEM}
    return RELEASED_SETTINGS | settings


def join_processors(
    checkpoint: Path, sam: Path, config: ConceptSegConfig, settings: Mapping[str, Any]
) -> ConceptSegProcessor:
    """Build our processor from the processor files of the VLM and SAM 3.

    Args:
        checkpoint: Folder of the authors' checkpoint.
        sam: Folder of SAM 3 or of a converted checkpoint, or Meta's `sam3.pt` with its vocabulary in the same folder.
        config: Our configuration, which determines the sizes if a folder contains no image processor.
        settings: Arguments of `ConceptSegProcessor`.

    Raises:
        ConversionError: If a tokenizer is missing or a file cannot be read.
    """
    from transformers import (
        Qwen2VLImageProcessor,
        Sam3ImageProcessor,
    )  # deferred, because they require torchvision

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
            f"the tokenizers and image processors of {str(checkpoint)!r} and {str(sam)!r} cannot be combined in a "
            f"processor ({reason}); download these folders again."
        ) from error


def save_original_processor(folder: Path, target: Path) -> dict[str, Any]:
    """Save the VLM part of our processor in the format of the authors' code.

    Args:
        folder: Folder of a converted checkpoint.
        target: Output folder.

    Returns:
        The settings of our processor that this format does not support.
    """
    processor = ConceptSegProcessor.from_pretrained(folder)
    plain = processor.vlm_processor()
    plain.tokenizer.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    _rewrite_for_older_releases(target, plain.chat_template)
    copy_generation_config(folder, target)
    changed = (name for name, value in OPTIONAL_SETTINGS.items() if getattr(processor, name) != value)
    return {name: getattr(processor, name) for name in (*_KEPT, *changed)}


def _rewrite_for_older_releases(folder: Path, chat_template: str | dict[str, str] | None) -> None:
    """Rewrite saved processor files in the format of Transformers 4, which the authors' code uses."""
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    special = content.pop("extra_special_tokens", None)
    if isinstance(special, list):  # Transformers 4 fails on a list
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
    """Copy the generation config of the VLM, if it exists."""
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
        shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")


def _image_processor(kind: type[BaseImageProcessor], folder: Path, **sizes: Any) -> BaseImageProcessor:
    """Load an image processor from its file, or create one with the sizes of the model's configuration."""
    if any((folder / name).is_file() for name in _IMAGE_FILES):
        return kind.from_pretrained(folder)
    return kind(**sizes)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConversionError(
            f"folder {str(folder)!r} contains no tokenizer ({_TOKENIZER_FILES[0]}); give a complete folder."
        )
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _sam_parts(folder: Path, kind: type[BaseImageProcessor], image_size: int) -> dict[str, Any]:
    if (folder / "sam_tokenizer").is_dir():  # a converted checkpoint
        processor = ConceptSegProcessor.from_pretrained(folder)
        return {
            "sam_image_processor": processor.sam_image_processor,
            "sam_tokenizer": processor.sam_tokenizer,
        }
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer and not (folder / BPE_NAME).is_file():
        raise ConversionError(
            f"folder {str(folder)!r} contains no tokenizer of SAM 3; copy {BPE_NAME} (folder assets of Meta's "
            "repository) to the folder of sam3.pt, or give the folder of facebook/sam3."
        )
    return {
        "sam_image_processor": _image_processor(
            kind, folder, size={"height": image_size, "width": image_size}
        ),
        "sam_tokenizer": _tokenizer(folder) if has_tokenizer else read_bpe(folder / BPE_NAME),
    }


def read_bpe(path: Path) -> CLIPTokenizer:
    """Build SAM 3's tokenizer from Meta's vocabulary: bytes, word-final bytes, merges and two special tokens."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 1 + _BPE_MERGES]]
        alphabet = list(bytes_to_unicode().values())
        special_tokens = ("<|startoftext|>", "<|endoftext|>")
        tokens = [*alphabet, *(token + "</w>" for token in alphabet), *map("".join, merges), *special_tokens]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Transformers accepts pairs, but its annotation does not include them.
        return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ConversionError(
            f"vocabulary {str(path)!r} cannot be read ({error}); download it again."
        ) from error


def _chat_template(folder: Path) -> str | None:
    """Return the template in the older file format; None if the file does not exist (the tokenizer's is used then)."""
    path = folder / _TEMPLATE_NAME
    return read_json(path).get("chat_template") if path.is_file() else None
