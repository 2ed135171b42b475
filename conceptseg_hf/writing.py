"""Writing files: each is complete or not there, and what cannot be written is explained in one sentence.

A file is written under a temporary name in its folder and then renamed, so neither a full disk nor a kill leaves half a
file or destroys the old one. NaN and Infinity, which JSON does not have, are written as null.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from .errors import one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A file or folder cannot be written; the message is one sentence that names it."""


def write_error(path: str | os.PathLike, error: Exception, remedy: str | None = None) -> WriteError:
    """Explains why a file or folder cannot be written.

    Args:
        path: The file or folder.
        error: What was raised: an OSError, or what libraries make of one.
        remedy: What to do; by default to make room, or to give another folder.
    """
    if isinstance(error, WriteError):
        return error
    code = _code(error)
    reason = one_line(error) if code is None else os.strerror(code)
    remedy = remedy or ("make room, or give another folder" if code in _FULL else "give another folder")
    return WriteError(f"{os.fspath(path)!r} cannot be written: {reason.rstrip('.')}; {remedy}.")


def is_full(error: Exception) -> bool:
    """Whether something was not written for want of room."""
    return _code(error) in _FULL


def _code(error: Exception) -> int | None:
    """The operating system's number of an error; libraries that are no Python put its words into theirs."""
    number = getattr(error, "errno", None)
    if number is not None:
        return number
    known = (*_FULL, errno.EROFS, errno.EACCES)
    return next((code for code in known if os.strerror(code) in str(error)), None)


def write_files(contents: Mapping[str | os.PathLike, bytes | str]) -> None:
    """Writes files that belong together: all under temporary names first, then each gets its own, in their order.

    Args:
        contents: What each file holds; text is written as UTF-8. Folders are made.

    Raises:
        WriteError: If one cannot be written; then none of them has changed.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in ((_followed(name), content) for name, content in contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = _temporary_name(path)
            with temporary[path].open("xb") as file:
                file.write(content if isinstance(content, bytes) else encode_text(content))
        for path, written in temporary.items():
            written.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for written in temporary.values():  # those that were renamed are no longer there
            with contextlib.suppress(OSError):
                written.unlink()


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes one file; see `write_files`."""
    write_files({path: content})


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Writes a JSON file with an indent of two; see `json_text` for the options."""
    write_file(path, json_text(content, **{"indent": 2, **options}) + "\n")


@contextmanager
def open_new(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file (UTF-8) that takes its name, and the place of an older one, when the block is through.

    For what is too large, or comes too slowly, to be held in memory.

    Raises:
        WriteError: If it cannot be written; the older one is still there.
    """
    target = _followed(path)
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def image_bytes(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as the content of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def json_text(content: Any, **options: Any) -> str:
    """JSON of plain values; numbers that are not finite become null.

    Args:
        content: The values.
        **options: As of `json.dumps`.
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_finite_numbers(content), allow_nan=False, **options)


def encode_text(text: str) -> bytes:
    """Text as UTF-8, whatever it holds.

    Python puts surrogates in the place of bytes of file names that do not fit the locale. Where these bytes are UTF-8,
    they are written as they are, else as escapes.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
        content.decode("utf-8")
    except UnicodeError:
        return text.encode("utf-8", "backslashreplace")
    return content


def _with_finite_numbers(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_finite_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_finite_numbers(item) for item in value]
    return value


def _followed(path: str | os.PathLike) -> Path:
    """The file itself where a link names it: the link should stay."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def _temporary_name(path: Path) -> Path:
    """A name beside a file; of its own, as one made of the file's could be too long."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")
