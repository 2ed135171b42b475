"""A checkpoint as a citizen of the Hub: uploads, and an opt-in remote-code stub.

The stub lets a checkpoint load with `trust_remote_code=True` and no import beforehand.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .cards import CARD_NAME, is_hub_id, merge_cards, model_card, save_model_card
from .errors import first_line
from .writing import write_file, write_json

logger = logging.getLogger(__name__)

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
            write_json(path, content, sort_keys=True)
    stub = folder / f"{STUB_NAME}.py"
    write_file(stub, _STUB)
    return stub


def keep_remote_stub(folder: str | os.PathLike) -> None:
    """Adds the stub to a folder whose `config.json` points at it, as that of a checkpoint loaded with it does."""
    path = Path(folder) / "config.json"
    if path.is_file():
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
        # A checkpoint of the Hub may be named before the file: owner/name--file.Class
        if any(f"--{target}".rpartition("--")[2].startswith(f"{STUB_NAME}.") for target in auto_map.values()):
            save_remote_stub(folder)


UPLOAD_ARGUMENTS = (
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
"""Arguments of `upload` that `save_pretrained(push_to_hub=True)` takes as well."""


def split_upload_arguments(
    save_directory: str | os.PathLike, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts the arguments of `save_pretrained`: those of `upload`, with `repo_id`, and the others (`token` is both)."""
    arguments = {name: kwargs[name] for name in UPLOAD_ARGUMENTS if name in kwargs}
    arguments["repo_id"] = kwargs.get("repo_id") or Path(save_directory).resolve().name
    others = {name: value for name, value in kwargs.items() if name not in arguments or name == "token"}
    return arguments, others


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    keep_card: bool = True,
    commit_message: str = "Upload ConceptSeg checkpoint",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | Sequence[str] | None = None,
) -> Any:
    """Uploads a folder to the Hub.

    Args:
        folder: The checkpoint's folder. Its card becomes the one that is uploaded.
        repo_id: The repository, made if it does not exist.
        keep_card: Keep a card that somebody has written in the repository; see `cards.merge_cards`.
        commit_message: Message of the commit.
        commit_description: Its description.
        private: Whether a new repository is private.
        token: Hub token; the stored one by default.
        revision: Branch, made if it does not exist.
        create_pr: Open a pull request instead.
        tags: Tags for the card.

    Returns:
        What the Hub says of the commit.
    """
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    path = Path(folder) / CARD_NAME
    ours = path.read_text(encoding="utf-8") if path.is_file() else None
    keep_card = keep_card or ours is None
    there = _card_of_repository(api, repo_id, revision) if keep_card else None
    if there is _UNREADABLE:
        card = None
    elif (card := _card_to_upload(there, ours, tags)) not in (None, there):
        write_file(path, card)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_NAME] if card in (None, there) else None,
    )


_UNREADABLE = "unreadable"


def _card_of_repository(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The card that a repository has; None if it has none, `_UNREADABLE` if it cannot be read."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
        return Path(path).read_text(encoding="utf-8")
    except (OSError, HfHubHTTPError, UnicodeDecodeError) as error:
        reason = first_line(error)
        logger.warning("the model card of %r cannot be read (%s); it is left as it is.", repo_id, reason)
        return _UNREADABLE


def _card_to_upload(there: str | None, ours: str | None, tags: Sequence[str]) -> str | None:
    """The card of the repository after an upload; None if there is none."""
    if there is not None and ours is not None:
        return merge_cards(there, ours, tags)
    card = ours if there is None else there
    if not tags:
        return card
    # A folder without a card, such as a processor's: there is nothing to add but tags.
    return merge_cards(card or "", card or "---\ntags: []\n---\n", tags)


__all__ = [
    "is_hub_id",
    "keep_remote_stub",
    "model_card",
    "save_model_card",
    "save_remote_stub",
    "split_upload_arguments",
    "upload",
]
