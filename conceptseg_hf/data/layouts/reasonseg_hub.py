"""ReasonSeg from the Hub repositories `Ricky06662/ReasonSeg_{val,test}`: Parquet files below a folder of that name.

The columns are image, text, mask (lists of bool) and image_id. In this copy, ignore regions are part of the foreground.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...images import load_mask, load_oriented_image
from ..files import FileItem, Index
from ..ground_truths import GroundTruth, Size
from ..paths import MissingFilesError, is_hidden
from ..suite import Source

if TYPE_CHECKING:
    import datasets

_COLUMNS = ("image", "text", "mask")


@dataclass(frozen=True)
class RowGroundTruth(GroundTruth):
    """The mask in a row of a table."""

    table: datasets.Dataset
    row: int

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        value = self.table.select_columns(["mask"])[self.row]["mask"]
        return load_mask(value if isinstance(value, Image.Image) else np.asarray(value)), None


@dataclass(frozen=True)
class RowItem(FileItem):
    """An item in a row of a table."""

    ground_truth: RowGroundTruth

    def read_fields(self) -> dict[str, Any]:
        """Return the fields of the sample that need no pixels."""
        text = self.ground_truth.table.select_columns(["text"])[self.ground_truth.row]["text"]
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"row {self.ground_truth.row} of {str(self.image)!r} has no text; download the file again."
            )
        return super().read_fields() | {"prompt": text.strip()}

    def read_image(self) -> tuple[Image.Image, int]:
        """See `FileItem.read_image`."""
        return load_oriented_image(
            self.ground_truth.table.select_columns(["image"])[self.ground_truth.row]["image"]
        )

    def read_header(self) -> tuple[Size, int]:
        """See `FileItem.read_header`."""
        image, orientation = self.read_image()
        return image.size, orientation


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the rows of the Parquet files below `root/ReasonSeg_SPLIT`, or `root` if it has that name; see `Index`.

    Raises:
        ImportError: If the package datasets is not installed.
    """
    name = f"ReasonSeg_{split}"
    folder = root if root.name == name else root / name
    files = sorted(path for path in folder.rglob("*.parquet") if not is_hidden(path))
    if not files:
        raise MissingFilesError(
            f"load_benchmark: {source.name!r} lacks the Parquet files of {str(folder)!r}; "
            f"download Ricky06662/{name} there.",
            (("Parquet file", folder / "data"),),
            1,
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"load_benchmark: {source.name!r} needs the package datasets; install it with: pip install datasets"
        ) from error
    try:
        table = datasets.Dataset.from_parquet([str(path) for path in files])
    except Exception as error:  # raised by Arrow, datasets or the file system
        raise ValueError(f"{str(files[0])!r} cannot be read as Parquet; download it again.") from error
    missing_columns = [column for column in _COLUMNS if column not in table.column_names]
    if missing_columns:
        raise ValueError(f"{str(files[0])!r} has no column {missing_columns[0]!r}; download the copy again.")
    return Index(
        [
            RowItem(
                sample_id=f"{row:06d}",
                image=files[0],
                ground_truth=RowGroundTruth(table, row),
                prompt="",
                level=source.level,
                group=source.group,
                family=source.name,
            )
            for row in range(len(table))
        ]
    )
