"""The images of a batch job by position: files of a folder, a glob or a list, or rows of Parquet tables.

A source knows names and counts, not pixels. Workers read the images of one batch at a time, so a source is small and
can be sent to other processes. Their order is fixed, because the position of an image identifies it when a job resumes.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..images import is_file
from ..writing import encode_text
from .hub import download, is_hub
from .items import SUFFIXES, ImageItem
from .tables import TableImages

_URLS = ("http://", "https://")


class ImageSource(Protocol):
    """Images by position."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, start: int, stop: int) -> list[ImageItem]:
        """Return the images at positions `start` to `stop`, exclusive; paths are not opened yet."""

    def identity(self) -> str:
        """Return a hash of names and order, by which a resumed job recognizes its images."""


class FileImages:
    """Images in files, or at URLs.

    Args:
        names: Name of each image in the results.
        root: Folder that names which are relative paths refer to.
        version: Version of the files, if known.
    """

    def __init__(self, names: Iterable[str], root: str = "", version: str = "") -> None:
        # Absolute, because other processes may have another working directory.
        self.names, self.root, self._version = tuple(names), str(Path(root).absolute()), version

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> list[ImageItem]:
        """See `ImageSource`."""
        return [
            ImageItem(start + offset, name, name if name.startswith(_URLS) else str(Path(self.root, name)))
            for offset, name in enumerate(self.names[start:stop])
        ]

    def identity(self) -> str:
        """See `ImageSource`."""
        digest = hashlib.sha256(self._version.encode())
        for name in self.names:
            digest.update(encode_text(name) + b"\0")
        return digest.hexdigest()[:16]


def open_images(images: str | os.PathLike | Sequence[str], column: str | None = None) -> ImageSource:
    """Find the images of a job, without opening them.

    Args:
        images: A folder, searched recursively; a glob; a .txt file with one path or URL per line, relative to the file;
            a .parquet file, or a folder or glob of these; `hf://datasets/OWNER/NAME[@REVISION][/FOLDER|/GLOB]`, which
            downloads files of a dataset on the Hub; or a sequence of paths and URLs.
        column: Column of a table with the images: paths, encoded bytes, or the image feature of `datasets`. By default
            the first column with a usual name, such as "image".

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images.
    """
    if not isinstance(images, (str, os.PathLike)):
        return _checked(FileImages(map(os.fspath, images)), "the sequence of images")
    name = os.fspath(images)
    if is_hub(name):
        folder, files = download(name)
        return _open_files(folder, files, name, column, version=folder.name)
    path = Path(name)
    if _is_folder(path):
        return _open_files(path, _files_below(path), name, column)
    if is_file(name):
        if path.suffix.lower() == ".txt":
            return _read_list(path)
        return _open_files(path.parent, [path], name, column)
    if glob.has_magic(name):
        # Path.glob accepts no absolute patterns.
        found = sorted(Path(each) for each in glob.glob(name, recursive=True) if Path(each).is_file())  # noqa: PTH207
        return _open_files(Path(), found, name, column)
    raise FileNotFoundError(
        f"images {name!r} is neither a folder nor a file; give a folder, a glob, a .txt list, a .parquet table or "
        "hf://datasets/OWNER/NAME."
    )


def _open_files(
    root: Path, files: Sequence[Path], name: str, column: str | None, version: str = ""
) -> ImageSource:
    """Return the tables among the files if there are any, else the images."""
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables:
        return _checked(TableImages(tables, column), repr(name))
    if column is not None:
        raise ValueError(f"images {name!r} contains no .parquet table; omit the column {column!r}.")
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if len(files) == 1 and not images:
        raise ValueError(
            f"images {name!r} is neither an image nor a list; give a folder, a glob, a .txt list or a .parquet table."
        )
    names = sorted(_relative(file, root) for file in images)
    return _checked(FileImages(names, str(root), version), repr(name))


def _read_list(path: Path) -> ImageSource:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ValueError(f"images {str(path)!r} cannot be read: {error.strerror}.") from error
    names = [line.strip() for line in lines if line.strip()]
    return _checked(FileImages(names, str(path.parent)), repr(str(path)))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, or contains a null byte
        return False


def _files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, without hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _checked(source: Any, what: str) -> ImageSource:
    if not len(source):
        raise ValueError(
            f"images: {what} contains no image; give files with one of {', '.join(SUFFIXES)}, or a table with rows."
        )
    return source
