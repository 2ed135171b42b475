"""Datasets on the Hub as images of a batch job: their files are downloaded once and read from the cache."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import first_line
from .items import SUFFIXES

_PREFIX = "hf://"
_FORM = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.~-]+))?(?:/(?P<path>.*))?")


def is_hub(name: str) -> bool:
    """Whether the images of a job are a dataset on the Hub."""
    return name.startswith(_PREFIX)


def download(name: str) -> tuple[Path, list[Path]]:
    """Download the images or tables of a dataset, or use the files in the cache.

    Args:
        name: `hf://datasets/OWNER/NAME[@REVISION][/FOLDER|/GLOB]`.

    Returns:
        The folder of the dataset's files in the cache, and the files.

    Raises:
        ValueError: If the name is invalid or the dataset cannot be downloaded.
    """
    match = _FORM.fullmatch(name)
    if match is None:
        raise ValueError(
            f"images {name!r} is not a dataset; give hf://datasets/OWNER/NAME, optionally with @REVISION and a path."
        )
    path = (match["path"] or "").strip("/")
    patterns = [path, f"{path}/*"] if path else ["*"]
    kinds = [f"*{suffix}" for suffix in (*SUFFIXES, ".parquet")]
    try:
        folder = Path(
            snapshot_download(
                match["repo"],
                repo_type="dataset",
                revision=match["revision"],
                allow_patterns=patterns if path else kinds,
            )
        )
    except (OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ValueError(f"images {name!r} cannot be downloaded: {reason}.") from error
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    wanted = [
        each
        for each in names
        if any(fnmatch(each, pattern) for pattern in patterns)
        and any(fnmatch(each.lower(), kind) for kind in kinds)
    ]
    return folder, [folder / each for each in wanted]
