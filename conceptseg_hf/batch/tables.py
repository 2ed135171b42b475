"""Images in Parquet tables: a column of paths, of encoded bytes, or the image feature of `datasets`."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import first_line
from ..images import ImageInput
from .items import ImageItem
from .requirements import import_parquet

COLUMNS = ("image", "image_path", "path", "file_name", "filepath", "bytes", "jpg", "png")
"""Names of the column with the images, in the order in which they are tried."""


class TableImages:
    """The rows of one or several Parquet files.

    Row groups are read one at a time and the last one is kept, because the batches of a job follow each other.

    Args:
        files: The files, in order.
        column: Name of the column; None to find it by its name.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a file is damaged or has no column with images.
    """

    def __init__(self, files: Sequence[Path], column: str | None = None) -> None:
        self.files = tuple(file.absolute() for file in files)
        self._groups: list[tuple[int, int]] = []  # file and row group
        lengths: list[int] = []
        self.column = ""
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            metadata, schema = _read_footer(file)
            found = _find_column(file, schema, column)
            if number and found != self.column:
                raise ValueError(
                    f"images {str(file)!r} has its images in column {found!r}, but {str(self.files[0])!r} in "
                    f"{self.column!r}; give tables of one kind."
                )
            self.column = found
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                lengths.append(metadata.row_group(group).num_rows)
            digest.update(f"{file.name}\0{file.stat().st_size}\0{metadata.num_rows}\0{found}\0".encode())
        self._starts = [0, *accumulate(lengths)]
        self._identity = digest.hexdigest()[:16]
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._read: tuple[int, list[Any] | str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_read")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return self._starts[-1]

    def identity(self) -> str:
        """See `ImageSource`."""
        return self._identity

    def read(self, start: int, stop: int) -> list[ImageItem]:
        """See `ImageSource`; rows that cannot be read have an error."""
        return [self._item(index) for index in range(start, min(stop, len(self)))]

    def _item(self, index: int) -> ImageItem:
        number = bisect_right(self._starts, index) - 1
        offset = index - self._starts[number]
        file = self.files[self._groups[number][0]]
        values = self._row_group(number)
        default = f"{file.name}#{index}"
        if isinstance(values, str):
            return ImageItem(index, default, error=values)
        name, image = _parse(values[offset], file.parent)
        if image is None:
            error = f"row {index} of {str(file)!r} has no value in column {self.column!r}; add an image."
            return ImageItem(index, default, error=error)
        return ImageItem(index, name or default, image)

    def _row_group(self, number: int) -> list[Any] | str:
        """Return the values of a row group, or one sentence if it is damaged."""
        with self._lock:
            if self._read is None or self._read[0] != number:
                self._read = (number, self._read_group(*self._groups[number]))
            return self._read[1]

    def _read_group(self, file: int, group: int) -> list[Any] | str:
        path = self.files[file]
        try:
            with import_parquet().ParquetFile(path) as table:
                return table.read_row_group(group, columns=[self.column])[self.column].to_pylist()
        except (OSError, ValueError) as error:
            reason = first_line(error).rstrip(".")
            return f"row group {group} of {str(path)!r} is damaged ({reason}); write the table again."


def _read_footer(file: Path) -> tuple[Any, Any]:
    try:
        with import_parquet().ParquetFile(file) as table:
            return table.metadata, table.schema_arrow
    except (OSError, ValueError) as error:
        raise ValueError(
            f"images {str(file)!r} is not a Parquet table or is damaged ({first_line(error).rstrip('.')})."
        ) from error


def _find_column(file: Path, schema: Any, column: str | None) -> str:
    usable = [field.name for field in schema if _holds_images(field.type)]
    found = next((name for name in COLUMNS if name in usable), None) if column is None else column
    if found not in usable:
        wanted = (
            "no column with a usual name" if column is None else f"no column {column!r} of paths or bytes"
        )
        raise ValueError(
            f"images {str(file)!r} has {wanted}; name one of its columns of paths or bytes: "
            f"{', '.join(usable) or 'none'}."
        )
    assert found is not None  # None is not a usable name
    return found


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return {"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)} != set()
    return any(
        check(kind)
        for check in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _parse(value: Any, folder: Path) -> tuple[str | None, ImageInput]:
    """Return the name and the image of a cell; relative paths refer to the folder of the table."""
    name = value if isinstance(value, str) else None
    if isinstance(value, dict):
        name = value.get("path")
        if value.get("bytes") is not None:
            return name, value["bytes"]
        value = name
    if isinstance(value, str) and not value.startswith(("http://", "https://")):
        return name, str(folder / value) if value else None
    return name, value
