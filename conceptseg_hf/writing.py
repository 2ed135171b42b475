"""Atomic file writing, with one-sentence errors.

A file is written under a temporary name in its folder and then renamed, so that neither a full disk nor a killed
process leaves a partial file or destroys the old one. NaN and Infinity, which JSON does not support, are written as
null.
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
    """A file or folder cannot be written; the message is one sentence with its name."""


def write_error(path: str | os.PathLike, error: Exception, remedy: str | None = None) -> WriteError:
    """Return an error that explains why a file or folder cannot be written.

    Args:
        path: The file or folder.
        error: The original exception: an OSError, or a library's exception that reports one.
        remedy: Remedy for the message; by default, to free some disk space or give another folder.
    """
    if isinstance(error, WriteError):
        return error
    code = _code(error)
    reason = one_line(error) if code is None else os.strerror(code)
    remedy = remedy or (
        "free some disk space, or give another folder" if code in _FULL else "give another folder"
    )
    return WriteError(f"{os.fspath(path)!r} cannot be written: {reason.rstrip('.')}; {remedy}.")


def is_full(error: Exception) -> bool:
    """Whether an error was caused by a full disk."""
    return _code(error) in _FULL


def _code(error: Exception) -> int | None:
    """Return the errno of an error; libraries in other languages only include its description in their message."""
    code = getattr(error, "errno", None)
    if code is not None:
        return code
    known = (*_FULL, errno.EROFS, errno.EACCES)
    return next((code for code in known if os.strerror(code) in str(error)), None)


def write_files(contents: Mapping[str | os.PathLike, bytes | str]) -> None:
    """Write a group of files: first all of them under temporary names, then rename them in order.

    Args:
        contents: Content of each file; strings are encoded as UTF-8. Missing folders are created.

    Raises:
        WriteError: If a file cannot be written, in which case none of the files is changed.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in ((_resolve_link(name), content) for name, content in contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = _temporary_name(path)
            with temporary[path].open("xb") as file:
                file.write(content if isinstance(content, bytes) else encode_text(content))
        for path, written in temporary.items():
            written.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for written in temporary.values():  # renamed files no longer exist under this name
            with contextlib.suppress(OSError):
                written.unlink()


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """Write one file; see `write_files`."""
    write_files({path: content})


def write_json(path: str | os.PathLike, content: Any, **options: Any) -> None:
    """Write a JSON file with an indent of two; see `json_text` for the options."""
    write_file(path, json_text(content, **{"indent": 2, **options}) + "\n")


@contextmanager
def open_new(path: str | os.PathLike) -> Iterator[TextIO]:
    """Context manager that opens a UTF-8 text file, which replaces an existing file when the block ends.

    For content that is too large, or produced too slowly, to be kept in memory.

    Raises:
        WriteError: If the file cannot be written, in which case an existing file is kept.
    """
    target = _resolve_link(path)
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


def image_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def json_text(content: Any, **options: Any) -> str:
    """Serialize plain values to JSON; NaN and infinite numbers become null.

    Args:
        content: The values.
        **options: Options of `json.dumps`.
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_finite_numbers(content), allow_nan=False, **options)


def encode_text(text: str) -> bytes:
    """Encode a string as UTF-8, including surrogates.

    Python represents bytes of file names that the locale cannot decode as surrogates. They are written as the original
    bytes if these are valid UTF-8, else as escape sequences.
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


def _resolve_link(path: str | os.PathLike) -> Path:
    """Return the target of a symbolic link, so that the link itself is kept."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def _temporary_name(path: Path) -> Path:
    """Return a temporary name in the folder of a file; a name derived from the file name could be too long."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")
