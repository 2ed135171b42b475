"""Output paths of the subcommands, which are checked before a model is loaded, and output encoding."""

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

# Most file systems limit names to 255 bytes.
_LONGEST_NAME = 255
_HASH_LENGTH = 8
# Large enough to detect a full disk, on which an empty file can often still be created.
_PROBE = b"\0" * 4096


def check_output_dir(path: str | Path, *files: str, option: str = "--output-dir") -> Path:
    """Check that a folder can be created and written, without creating it.

    Args:
        path: The folder, which does not need to exist.
        files: Names of files that will be written in the folder, if known.
        option: Name of the command-line option, for the message.

    Raises:
        BadInputError: If the folder or a file cannot be written.
    """
    fault = find_write_error(Path(path), files)
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another folder.")
    return Path(path)


def check_output_file(path: str | Path, option: str) -> None:
    """Check that a single file can be written, without creating it.

    Raises:
        BadInputError: If the file cannot be written.
    """
    fault = find_write_error(Path(path).parent, [Path(path).name])
    if fault is not None:
        raise BadInputError(f"{option} {str(path)!r} cannot be written: {fault}; give another file.")


def folder_name(benchmarks: str) -> str:
    """Convert the value of --benchmark to a part of a folder name."""
    return shorten_name(re.sub(r"[,\s]+", "+", benchmarks.strip()), reserved=60)


def shorten_name(name: str, reserved: int) -> str:
    """Shorten a name to the limit of file systems; a name that is too long is cut and ends in its hash.

    Args:
        name: The name.
        reserved: Number of bytes reserved for a suffix.
    """
    content = name.encode("utf-8", "surrogateescape")
    if len(content) <= _LONGEST_NAME - reserved:
        return name
    digest = hashlib.sha256(content).hexdigest()[:_HASH_LENGTH]
    kept = content[: _LONGEST_NAME - reserved - len(digest) - 1]
    # Drops a partially cut multi-byte character, and bytes of the name that are not valid UTF-8.
    return f"{kept.decode(errors='ignore').rstrip()}-{digest}"


def find_write_error(folder: Path, files: Sequence[str] = ()) -> str | None:
    """Return the reason why a folder, or files in it, cannot be written; None if they can.

    Permission bits are not sufficient, so a temporary file is created and existing files are opened for writing.

    Args:
        folder: The folder, which does not need to exist.
        files: Names of files in the folder.
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
def explain_resuming(folder: Path) -> Iterator[None]:
    """Context manager that, on Ctrl-C, explains how to resume the run from its output folder."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the records are kept in {str(folder)!r}, and the same command resumes the run."
        ) from None


def make_printable() -> None:
    """Make standard output and error accept any string: unsupported characters are escaped, file names are not."""
    codecs.register_error("conceptseg", _escape)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # tests and notebooks may replace the streams
            stream.reconfigure(errors="conceptseg")


def _escape(error: UnicodeError) -> tuple[bytes, int]:
    """Codec error handler: write undecodable bytes of file names unchanged, and escape all other characters."""
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
