"""Uploads to the Hub, and an optional remote-code stub.

With the stub, a checkpoint can be loaded with `trust_remote_code=True` without importing this package first.
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

_STUB = '''"""Redirects Transformers to the installed package `conceptseg-hf`; contains no other code."""

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor  # noqa: F401
'''
# No `custom_pipelines`: with it, `pipeline("concept-segmentation", model=folder)` would require trust_remote_code even
# if the package has been imported.
_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": f"{STUB_NAME}.ConceptSegConfig",
        "AutoModel": f"{STUB_NAME}.ConceptSegForSegmentation",
    },
    "processor_config.json": {"AutoProcessor": f"{STUB_NAME}.ConceptSegProcessor"},
}


def save_remote_stub(folder: str | os.PathLike) -> Path:
    """Add the stub to a saved checkpoint, so that Auto classes can load it with `trust_remote_code=True`.

    The package must still be installed where the checkpoint is loaded. If it has been imported, the stub is not used.

    Args:
        folder: A folder written by `model.save_pretrained` and `processor.save_pretrained`.

    Returns:
        The path of the stub.

    Raises:
        FileNotFoundError: If the folder contains no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"save_remote_stub: {str(folder)!r} contains no config.json; save the model there first."
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
    """Add the stub to a folder if its `config.json` refers to it, as after saving a model that was loaded with it."""
    path = Path(folder) / "config.json"
    if path.is_file():
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
        # A reference may start with the id of a Hub repository: owner/name--file.Class
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
"""Arguments of `upload` that `save_pretrained(push_to_hub=True)` also accepts."""


def split_upload_arguments(
    save_directory: str | os.PathLike, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `save_pretrained` into those of `upload` (with `repo_id`) and the rest; `token` is in both."""
    arguments = {name: kwargs[name] for name in UPLOAD_ARGUMENTS if name in kwargs}
    arguments["repo_id"] = kwargs.get("repo_id") or Path(save_directory).resolve().name
    save_arguments = {
        name: value for name, value in kwargs.items() if name not in arguments or name == "token"
    }
    return arguments, save_arguments


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
    """Upload a folder to the Hub.

    Args:
        folder: Folder of the checkpoint. Its model card is updated to the card that is uploaded.
        repo_id: The repository, created if it does not exist.
        keep_card: Merge the card with an existing card of the repository; see `cards.merge_cards`.
        commit_message: Commit message.
        commit_description: Commit description.
        private: Whether a new repository is private.
        token: Hub token; by default the stored token.
        revision: Branch, created if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        tags: Tags for the card.

    Returns:
        The `CommitInfo` of the upload.
    """
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    path = Path(folder) / CARD_NAME
    local = path.read_text(encoding="utf-8") if path.is_file() else None
    keep_card = keep_card or local is None
    existing = _card_of_repository(api, repo_id, revision) if keep_card else None
    if existing is _UNREADABLE:
        card = None
    elif (card := _card_to_upload(existing, local, tags)) not in (None, existing):
        write_file(path, card)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_NAME] if card in (None, existing) else None,
    )


_UNREADABLE = "unreadable"


def _card_of_repository(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Return the card of a repository; None if there is no card, `_UNREADABLE` if it cannot be read."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
        return Path(path).read_text(encoding="utf-8")
    except (OSError, HfHubHTTPError, UnicodeDecodeError) as error:
        reason = first_line(error)
        logger.warning(
            "the model card of %r cannot be read (%s); the card is kept unchanged.", repo_id, reason
        )
        return _UNREADABLE


def _card_to_upload(existing: str | None, local: str | None, tags: Sequence[str]) -> str | None:
    """Return the card of the repository after an upload; None if there is no card."""
    if existing is not None and local is not None:
        return merge_cards(existing, local, tags)
    card = local if existing is None else existing
    if not tags:
        return card
    # The folder of a processor has no card, so that only tags are added.
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
