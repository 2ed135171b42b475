"""Where verbs write: what cannot be written is refused before anything is loaded."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .arguments import BadInputError


def check_output_dir(path: str | Path, *files: str, option: str = "--output-dir") -> Path:
    """Finds out whether a folder can be made and written; makes nothing, as the verb may still be refused.

    Args:
        path: The folder, which need not be there yet.
        files: Names of files that will be written in it, where these are known.
        option: What gave the folder, for the message.

    Raises:
        BadInputError: If it cannot.
    """
    fault = _find_fault(Path(path), files)
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another folder.")
    return Path(path)


def check_output_file(path: str | Path, option: str) -> None:
    """The same for a single file.

    Raises:
        BadInputError: If it cannot be written.
    """
    fault = _find_fault(Path(path).parent, [Path(path).name])
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another file.")


def folder_name(benchmarks: str) -> str:
    """The value of --benchmark as a part of a folder's name."""
    return re.sub(r"[,\s]+", "+", benchmarks.strip())


def _find_fault(folder: Path, files: Sequence[str]) -> str | None:
    """Tries, as permission bits do not say all: a temporary file where the folder will be, and the files there are."""
    place = folder
    try:
        place = next(place for place in (folder, *folder.parents) if _exists(place))
        tempfile.TemporaryFile(dir=place).close()
        for place in map(folder.joinpath, files):
            if _exists(place):
                place.open("ab").close()
    except NotADirectoryError:
        return f"{str(place)!r} is a file"
    except IsADirectoryError:
        return f"{str(place)!r} is a folder"
    except OSError as error:
        return f"{str(place)!r}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
