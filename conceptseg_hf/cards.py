"""Model cards: what a checkpoint is, what it was made from, and under which licence it is passed on."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .writing import write_file

if TYPE_CHECKING:
    from .configuration_conceptseg import ConceptSegConfig

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
SAM_LICENSE_LINK = "https://huggingface.co/facebook/sam3/blob/main/LICENSE"

# Not "transformers", and no pipeline tag: the Hub would show code for a task of Transformers, which no checkpoint of
# ours serves, and for an Auto class without the import that makes our models known.
LIBRARY_NAME = "conceptseg-hf"

_RELEASED_SAM_BACKBONE = (1024, 32)  # width and depth of the vision transformer

# What the cards say that libraries write by themselves: Transformers' `push_to_hub`, its Trainer, TRL's trainers.
_WRITTEN_BY_LIBRARIES = (
    "This model card has been automatically generated",
    "This model card has been generated automatically according to the information the Trainer had access to",
    "It has been trained using [TRL](https://github.com/huggingface/trl)",
)

# What such a card may say by somebody's choice; the rest is the library's.
_KEPT_METADATA = ("license", "license_name", "license_link", "base_model", "datasets", "language")


def save_model_card(
    folder: str | os.PathLike,
    config: ConceptSegConfig,
    base_models: Sequence[str] = (),
    report: Any = None,
    overwrite: bool = False,
    tags: Sequence[str] = (),
    training: str = "",
    **metadata: Any,
) -> Path:
    """Writes the model card of a checkpoint.

    A card that is there is kept, and completed where it says nothing of licence and base models; one that a library
    has written by itself gives way (see `merge_cards`).

    Args:
        folder: The checkpoint's folder.
        config: Its configuration.
        base_models: Hub ids of what it was made from, besides those that the configuration names. Anything
            that is no hub id is left out, so that no path of this machine is published.
        report: An `EvaluationReport`, or the folder that `conceptseg evaluate` wrote: its table goes into the card
            and its numbers into the card's metadata.
        overwrite: Replace a card that is there.
        tags: Further tags.
        training: A paragraph on how it was trained.
        **metadata: Further fields of `ModelCardData`, such as `datasets`.

    Returns:
        The path of the card.

    Raises:
        ValueError: If the report cannot be read.
    """
    path = Path(folder) / CARD_NAME
    card = model_card(config, base_models, report, tags, training, **metadata)
    content = _content(card)
    if path.exists() and not overwrite:
        content = merge_cards(path.read_text(encoding="utf-8"), content, tags)
    write_file(path, content)
    return path


def model_card(
    config: ConceptSegConfig,
    base_models: Sequence[str] = (),
    report: Any = None,
    tags: Sequence[str] = (),
    training: str = "",
    **metadata: Any,
) -> ModelCard:
    """The model card of a checkpoint; see `save_model_card`."""
    named = [
        *base_models,
        config.sam_name_or_path,
        config.vlm_config.name_or_path,
        config.sam_config.name_or_path,
    ]
    bases = list(dict.fromkeys(name for name in named if name and is_hub_id(name)))
    holds_released_sam = _holds_released_sam(config, bases)
    markdown, results = ("", None) if report is None else _read_report(report)
    if holds_released_sam:
        # The SAM License covers SAM 3's weights and what is made with them, so it is named for the whole.
        metadata |= {"license": "other", "license_name": "sam-license", "license_link": SAM_LICENSE_LINK}
    data = ModelCardData(
        base_model=bases or None,
        library_name=LIBRARY_NAME,
        tags=list(dict.fromkeys(["concept-segmentation", "conceptseg", *tags])),
        model_name="ConceptSeg" if results else None,
        eval_results=results,
        **metadata,
    )
    text = _card_text(config, bases, holds_released_sam, training, markdown)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def merge_cards(there: str, ours: str, tags: Sequence[str] = ()) -> str:
    """What becomes of a card where another one is to be written.

    A card that a library has written by itself, or that has no text, gives way to ours, which takes over what else
    its metadata says. Any other card keeps its text and its metadata; licence and base models are added if it
    names none, since they must not get lost.

    Args:
        there: The card that is there.
        ours: The card to be written, in full.
        tags: Tags that the card must have.

    Returns:
        The content of the card.
    """
    try:
        old, new = _parse(there), _parse(ours)
    except Exception as error:  # a card that somebody wrote in whatever way must not stop a save
        logger.warning("the metadata of the model card cannot be read (%s); it is left as it is.", error)
        return there
    if _is_written_by_library(old.text):
        # Without a text, somebody may have filled in the metadata on the Hub's page.
        names = _KEPT_METADATA if old.text.strip() else sorted({*old.data.to_dict()} - {"tags"})
        _complete(new.data, old.data, names)
        _add_tags(new.data, [*(old.data.get("tags") or ()), *tags])
        return _content(new)
    before = old.data.to_dict()
    if old.data.get("license") is None:
        _complete(old.data, new.data, ["license", "license_name", "license_link"])
    elif new.data.get("license") not in (None, old.data.get("license")):
        logger.warning(
            "the model card names the license %r, but the checkpoint holds weights under the SAM License (%s); say "
            "so in the card.",
            old.data.get("license"),
            SAM_LICENSE_LINK,
        )
    _complete(old.data, new.data, ["base_model"])
    _add_tags(old.data, tags)
    return there if old.data.to_dict() == before else _content(old)


def _parse(content: str) -> ModelCard:
    has_metadata = re.match(r"\s*---\s*\n", content)
    return ModelCard(content if has_metadata else f"---\n{{}}\n---\n{content}", ignore_metadata_errors=True)


def _content(card: ModelCard) -> str:
    return str(card).rstrip() + "\n"


def _is_written_by_library(text: str) -> bool:
    return not text.strip() or any(phrase in text for phrase in _WRITTEN_BY_LIBRARIES)


def _complete(data: CardData, other: CardData, names: Sequence[str]) -> None:
    """Takes fields over that are missing."""
    for name in names:
        if not data.get(name) and other.get(name):
            data[name] = other.get(name)


def _add_tags(data: CardData, tags: Sequence[str]) -> None:
    if tags:
        data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), *tags]))


def _holds_released_sam(config: ConceptSegConfig, bases: Sequence[str]) -> bool:
    backbone = config.sam_config.vision_config.backbone_config
    # A local copy has no name that says so, but its size does.
    return any(name.startswith("facebook/sam3") for name in bases) or (
        (backbone.hidden_size, backbone.num_hidden_layers) == _RELEASED_SAM_BACKBONE
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can only be a repository of the Hub: `owner/name`, and nothing on this disk."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _card_text(
    config: ConceptSegConfig, bases: Sequence[str], holds_released_sam: bool, training: str, evaluation: str
) -> str:
    text, ctm = config.get_text_config(), config.ctm_config
    lines = [
        "# ConceptSeg checkpoint",
        "",
        "Segments what a prompt means, by words or by reasoning over reference images (ConceptSeg-R1).",
        "",
        "| part | what it is |",
        "|---|---|",
        f"| VLM | {config.vlm_config.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size} |",
        f"| Concept Translation Module | {ctm.num_queries} concept queries, {ctm.num_layers} blocks |",
        f"| SAM 3 | frozen, images of {config.sam_config.vision_config.backbone_config.image_size} pixels |",
        "",
        "## Use",
        "",
        "```python",
        "import conceptseg_hf  # pip install conceptseg-hf",
        "from transformers import pipeline",
        "",
        'segment = pipeline("concept-segmentation", model="THIS_CHECKPOINT")',
        'segment("image.jpg", prompt="the odd one out")["mask"].save("mask.png")',
        "```",
        "",
        "## Licences",
        "",
    ]
    if holds_released_sam:
        lines.append(
            f"- The weights of SAM 3 in it are Meta's, under the [SAM License]({SAM_LICENSE_LINK}): whoever passes "
            "this checkpoint on passes that licence on with it."
        )
    others = [name for name in bases if not name.startswith("facebook/sam3")]
    lines += [f"- Made from [{name}](https://huggingface.co/{name}); its licence applies." for name in others]
    if not bases:
        lines.append("- No base model is recorded; whoever publishes this checkpoint adds its licence here.")
    if training:
        lines += ["", "## Training", "", training.strip()]
    if evaluation:
        lines += ["", "## Evaluation", "", evaluation.strip()]
    return "\n".join(lines)


def _read_report(report: Any) -> tuple[str, list[EvalResult]]:
    """The Markdown of an evaluation, and its numbers over all samples."""
    if isinstance(report, (str, os.PathLike)):
        folder = Path(report)
        try:
            markdown = (folder / "report.md").read_text(encoding="utf-8")
            content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"evaluation report {str(folder)!r} cannot be read ({error}); give the folder that `conceptseg "
                "evaluate` wrote."
            ) from error
    else:
        markdown, content = report.to_markdown(), report.to_dict()
    settings = content["settings"]
    total = next(row for row in content["table"] if row["level"] == row["group"] == "all")
    numbers = {"foreground IoU (0 to 1)": total["foreground_iou"]}
    numbers |= {f"{name} (percent)": value for name, value in total["masks"].items()}
    return markdown, [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=str(settings["benchmark"]),
            dataset_name=str(settings["benchmark"]),
            dataset_split=str(settings.get("split")),
            metric_type=name.split(" (")[0],
            metric_name=f"{name}, protocol {settings['protocol']}",
            metric_value=value,
        )
        for name, value in numbers.items()
        if value is not None
    ]
