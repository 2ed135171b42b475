"""Where subcommands write: what cannot be written is refused before anything is loaded."""

from __future__ import annotations

import codecs
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .arguments import BadInputError

# Most file systems take names of 255 bytes.
_LONGEST_NAME = 255
_HASH_LENGTH = 8
# Enough to notice a full disk, for which an empty file may still have room.
_PROBE = b"\0" * 4096


def check_output_dir(path: str | Path, *files: str, option: str = "--output-dir") -> Path:
    """Finds out whether a folder can be made and written; makes nothing, as the subcommand may still be refused.

    Args:
        path: The folder, which need not be there yet.
        files: Names of files that will be written in it, where these are known.
        option: What gave the folder, for the message.

    Raises:
        BadInputError: If it cannot.
    """
    fault = find_write_error(Path(path), files)
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another folder.")
    return Path(path)


def check_output_file(path: str | Path, option: str) -> None:
    """The same for a single file.

    Raises:
        BadInputError: If it cannot be written.
    """
    fault = find_write_error(Path(path).parent, [Path(path).name])
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another file.")


def folder_name(benchmarks: str) -> str:
    """The value of --benchmark as a part of a folder's name."""
    return shorten_name(re.sub(r"[,\s]+", "+", benchmarks.strip()), reserved=60)


def shorten_name(name: str, reserved: int) -> str:
    """A name that fits in a file system; what is too long ends in a hash of all of it.

    Args:
        name: The name.
        reserved: Bytes to leave free for what will follow.
    """
    content = name.encode("utf-8", "surrogateescape")
    if len(content) <= _LONGEST_NAME - reserved:
        return name
    digest = hashlib.sha256(content).hexdigest()[:_HASH_LENGTH]
    kept = content[: _LONGEST_NAME - reserved - len(digest) - 1]
    # A character of several bytes may have been cut; a file name with bytes of no character is cut there as well.
    return f"{kept.decode(errors='ignore').rstrip()}-{digest}"


def find_write_error(folder: Path, files: Sequence[str] = ()) -> str | None:
    """Why a folder, or files in it, cannot be written; None if they can.

    Tries, as permission bits do not say all: a temporary file where the folder will be, and the files there are.

    Args:
        folder: The folder, which need not be there yet.
        files: Names of files in it.
    """
    place = folder
    try:
        place = next(place for place in (folder, *folder.parents) if _exists(place))
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(_PROBE)
            file.flush()
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


@contextmanager
def says_how_to_go_on(folder: Path) -> Iterator[None]:
    """A block that may be stopped by Ctrl-C, as all that it has made is in a folder from which it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what was evaluated is kept in {str(folder)!r}, and the same command goes on from there."
        ) from None


def make_printable() -> None:
    """Lets standard output take any text, also where its encoding is ASCII; names of files are printed as they are."""
    codecs.register_error("conceptseg", _escape)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have put something else there
            stream.reconfigure(errors="conceptseg")


def _escape(error: UnicodeError) -> tuple[bytes, int]:
    """Handles what an encoding lacks: bytes of file names as they were, all else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    pieces = (
        bytes([ord(letter) - 0xDC00])
        if "\udc80" <= letter <= "\udcff"
        else letter.encode("ascii", "backslashreplace")
        for letter in text
    )
    return b"".join(pieces), error.end


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
