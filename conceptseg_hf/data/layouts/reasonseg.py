"""ReasonSeg as published by LISA: folders `train`, `val` and `test` with `NAME.jpg` and `NAME.json` for each image.

Each image is one sample with the first of its texts, as in LISA's evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import FileItem, Index
from ..ground_truths import PolygonFile
from ..paths import MissingFilesError, composed, inside, is_hidden
from ..suite import Source


@dataclass(frozen=True)
class ReasonSegItem(FileItem):
    """An item with its prompt in the annotation file."""

    ground_truth: PolygonFile

    def read_fields(self) -> dict[str, Any]:
        """Return the fields of the sample that need no pixels; this reads the annotation."""
        annotation = self.ground_truth.read_annotation()
        texts = annotation.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
            raise ValueError(
                f"{str(self.ground_truth.path)!r} has no text; use ReasonSeg's JSON as published."
            )
        family = "sentence" if annotation.get("is_sentence") else "phrase"
        return super().read_fields() | {"prompt": texts[0].strip(), "family": family}


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of a split below `root` or `root/ReasonSeg`; see `Index`."""
    folder = root / "ReasonSeg" / split if (root / "ReasonSeg").is_dir() else root / split
    if not folder.is_dir():
        raise MissingFilesError(
            f"load_benchmark: {source.name!r} lacks the folder {str(folder)!r}; put the split there.",
            (("folder", folder),),
            1,
        )
    paths = (path for path in folder.iterdir() if path.suffix in (".jpg", ".json") and not is_hidden(path))
    stems = {composed(path.stem) for path in paths}
    return Index(
        [
            ReasonSegItem(
                sample_id=stem,
                image=inside(folder, f"{stem}.jpg"),
                ground_truth=PolygonFile(inside(folder, f"{stem}.json")),
                prompt="",
                level=source.level,
                group=source.group,
                family="",
            )
            for stem in sorted(stems)
        ]
    )
