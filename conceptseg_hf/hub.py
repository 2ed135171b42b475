"""A checkpoint as a citizen of the Hub: its model card, and an opt-in remote-code stub.

The stub lets a checkpoint load with `trust_remote_code=True` and no import beforehand.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

if TYPE_CHECKING:
    from .configuration_conceptseg import ConceptSegConfig

CARD_NAME = "README.md"
_RELEASED_SAM_BACKBONE = (1024, 32)  # width and depth of the vision transformer
SAM_LICENSE_LINK = "https://huggingface.co/facebook/sam3/blob/main/LICENSE"

STUB_NAME = "conceptseg_stub"

_STUB = '''"""Points Transformers at the installed package `conceptseg-hf`; holds no code of its own."""

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor  # noqa: F401
'''
# No `custom_pipelines`: with it even `pipeline("concept-segmentation", model=folder)` after an import would
# demand trust_remote_code.
_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": f"{STUB_NAME}.ConceptSegConfig",
        "AutoModel": f"{STUB_NAME}.ConceptSegForSegmentation",
    },
    "processor_config.json": {"AutoProcessor": f"{STUB_NAME}.ConceptSegProcessor"},
}


def save_remote_stub(folder: str | os.PathLike) -> Path:
    """Adds the stub to a saved checkpoint; Auto classes then need only `trust_remote_code=True` to load it.

    The package itself must still be installed where the checkpoint is loaded. Where it is imported, nothing
    changes.

    Args:
        folder: A folder written by `model.save_pretrained` and `processor.save_pretrained`.

    Returns:
        The path of the stub.

    Raises:
        FileNotFoundError: If the folder holds no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"save_remote_stub: {str(folder)!r} holds no config.json; save the model there first."
        )
    for name, auto_map in _AUTO_MAPS.items():
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = auto_map
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stub = folder / f"{STUB_NAME}.py"
    stub.write_text(_STUB, encoding="utf-8")
    return stub


def save_model_card(
    folder: str | os.PathLike,
    config: ConceptSegConfig,
    base_models: list[str] | tuple[str, ...] = (),
    report: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes the model card of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        config: Its configuration.
        base_models: Hub ids of what it was made from, besides those that the configuration names. Anything
            that is no hub id is left out, so that no path of this machine is published.
        report: An `EvaluationReport`, or the folder that `conceptseg evaluate` wrote: its table goes into the card
            and its numbers into the card's metadata.
        overwrite: Replace a card that is there; it is kept otherwise.

    Returns:
        The path of the card.

    Raises:
        ValueError: If the report cannot be read.
    """
    path = Path(folder) / CARD_NAME
    if path.exists() and not overwrite:
        return path
    path.write_text(str(model_card(config, base_models, report)) + "\n", encoding="utf-8")
    return path


def model_card(
    config: ConceptSegConfig, base_models: list[str] | tuple[str, ...] = (), report: Any = None
) -> ModelCard:
    """The model card of a checkpoint; see `save_model_card`."""
    named = [
        *base_models,
        config.sam_name_or_path,
        config.vlm_config.name_or_path,
        config.sam_config.name_or_path,
    ]
    bases = list(dict.fromkeys(name for name in named if name and is_hub_id(name)))
    backbone = config.sam_config.vision_config.backbone_config
    # A local copy has no name that says so, but its size does.
    holds_released_sam = any(name.startswith("facebook/sam3") for name in bases) or (
        (backbone.hidden_size, backbone.num_hidden_layers) == _RELEASED_SAM_BACKBONE
    )
    markdown, results = ("", None) if report is None else _read_report(report)
    data = ModelCardData(
        base_model=bases or None,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["concept-segmentation", "conceptseg"],
        # The SAM License covers SAM 3's weights and what is made with them, so it is named for the whole.
        license="other" if holds_released_sam else None,
        license_name="sam-license" if holds_released_sam else None,
        license_link=SAM_LICENSE_LINK if holds_released_sam else None,
        model_name="ConceptSeg" if results else None,
        eval_results=results,
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n{_card_text(config, bases, holds_released_sam, markdown)}"
    )


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    keep_card: bool = True,
    commit_message: str = "Upload ConceptSeg checkpoint",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Uploads a folder to the Hub.

    Args:
        folder: The checkpoint's folder.
        repo_id: The repository, made if it does not exist.
        keep_card: Leave a card that the repository has as it is.
        commit_message: Message of the commit.
        private: Whether a new repository is private.
        token: Hub token; the stored one by default.
        revision: Branch.
        create_pr: Open a pull request instead.

    Returns:
        What the Hub says of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    has_card = keep_card and api.file_exists(repo_id, CARD_NAME, revision=revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_NAME] if has_card else None,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can only be a repository of the Hub: `owner/name`, and nothing on this disk."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _card_text(config: ConceptSegConfig, bases: list[str], holds_released_sam: bool, evaluation: str) -> str:
    text, ctm = config.get_text_config(), config.ctm_config
    lines = [
        "# ConceptSeg checkpoint",
        "",
        "Segments what a prompt means, by words or by reasoning over reference images (ConceptSeg-R1).",
        "",
        "| part | what it is |",
        "|---|---|",
        f"| MLLM | {config.vlm_config.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size} |",
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
