"""Path resolution inside a folder, checks for missing files, and reading of text and JSON files."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any

from ..images import is_file

_MAX_LISTED = 3  # missing files listed in an error message


class MissingFilesError(FileNotFoundError):
    """Raised when files of a dataset are missing.

    Attributes:
        missing: Pairs of kind ("image", "mask", ...) and path of all missing files.
        total: Number of files that were checked.
    """

    def __init__(self, message: str, missing: tuple[tuple[str, Path], ...] = (), total: int = 0) -> None:
        super().__init__(message)
        self.missing, self.total = missing, total


def inside(root: Path, relative: str) -> Path:
    """Return the path of a file below a folder.

    Args:
        root: The folder.
        relative: Relative path as written in the dataset, with forward slashes or backslashes.

    Returns:
        The path, with names as they are on disk if these use the other Unicode form (NFC or NFD).

    Raises:
        ValueError: If the path is absolute or leaves the folder. (Symbolic links in the folder may point anywhere.)
    """
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise ValueError(f"path {relative!r} is invalid; give a path relative to {str(root)!r}.")
    windows = PureWindowsPath(relative)  # splits at slashes and backslashes
    parts = os.path.normpath("/".join(windows.parts)).split("/") if not windows.anchor else [".."]
    if parts[0] == "..":
        raise ValueError(
            f"path {relative!r} is outside of {str(root)!r}; give paths relative to that folder, without '..'."
        )
    path = root.joinpath(*parts)
    return path if relative.isascii() or os.access(path, os.F_OK) else _as_on_disk(root, parts)


def _as_on_disk(root: Path, parts: list[str]) -> Path:
    """Return a path with each name looked up by its NFC form (macOS writes names in NFD)."""
    path = root
    for part in parts:
        if not part.isascii() and not os.access(path / part, os.F_OK):
            part = _names_in(path).get(composed(part), part)
        path = path / part
    return path


def _names_in(folder: Path) -> dict[str, str]:
    try:
        return _names_by_form(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=8)
def _names_by_form(folder: Path, _modified: int) -> dict[str, str]:
    """Return the non-ASCII names in a folder by their NFC form; cached until the folder changes."""
    return {composed(path.name): path.name for path in folder.iterdir() if not path.name.isascii()}


def composed(name: str) -> str:
    """Return a name in composed Unicode form (NFC), so that equivalent names compare equal."""
    return unicodedata.normalize("NFC", name)


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden or a system file, such as the `._photo.jpg` that macOS writes next to `photo.jpg`."""
    return path.name.startswith(".") or "__MACOSX" in path.parts


def existing_folder(root: str | os.PathLike | None, name: str) -> Path:
    """Return the folder of a dataset.

    Raises:
        ValueError: If no folder is given or it does not exist.
    """
    if root is None:
        raise ValueError(f"load_benchmark: {name!r} reads files; give root=, the folder that contains them.")
    folder = Path(root).expanduser()
    if not os.access(folder, os.F_OK) or not folder.is_dir():
        raise ValueError(f"load_benchmark: root {str(root)!r} is not a folder; give the folder of {name!r}.")
    return folder


def required_file(path: Path, name: str) -> Path:
    """Return the path of the index file of a dataset.

    Raises:
        MissingFilesError: If the file does not exist.
    """
    if not is_file(path):
        raise MissingFilesError(
            f"load_benchmark: {name!r} lacks {str(path)!r}, which lists its samples; put it there.",
            (("index", path),),
            1,
        )
    return path


def check_files(files: Iterable[tuple[str, Path]], name: str, root: Path) -> None:
    """Check that all files exist.

    Args:
        files: Pairs of kind and path; a path may occur more than once.
        name: Name of the dataset.
        root: Folder of the dataset.

    Raises:
        MissingFilesError: If files are missing; the error lists all of them.
    """
    kinds: dict[Path, str] = {}
    for kind, path in files:
        kinds.setdefault(path, kind)
    missing = tuple((kind, path) for path, kind in kinds.items() if not is_file(path))
    if missing:
        counts = " and ".join(
            f"{count} {kind if count == 1 else kind + 's'}"
            for kind, count in Counter(kind for kind, _ in missing).items()
        )
        names = ", ".join(repr(os.path.relpath(path, root)) for _, path in missing[:_MAX_LISTED])
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise MissingFilesError(
            f"load_benchmark: {name!r} lacks {len(missing)} of its {len(kinds)} files below {str(root)!r} ({counts}): "
            f"{names}{more}; put them there, or give another root.",
            missing,
            len(kinds),
        )


def read_text(path: Path, fallback_encoding: str | None = None) -> str:
    """Read a text file in UTF-8, with or without byte order mark, or else in a fallback encoding.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it cannot be decoded.
    """
    content = path.read_bytes()
    for encoding in ("utf-8-sig", fallback_encoding):
        if encoding is not None:
            try:
                return content.decode(encoding)
            except UnicodeDecodeError:
                continue
    raise ValueError(f"{str(path)!r} is not UTF-8 text; save it as UTF-8.")


def read_json(path: Path, fallback_encoding: str | None = None) -> Any:
    """Read a JSON file; see `read_text`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(read_text(path, fallback_encoding))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON (line {error.lineno}); download or write the file again."
        ) from error
