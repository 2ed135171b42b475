"""File layouts of datasets: one module per layout, each with `index_files(root, source, split) -> Index`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..files import Index
from ..suite import Source
from . import (
    authors,
    cityscapes,
    coco20i,
    mgrounding,
    mig_bench,
    photos,
    plain,
    reasonseg,
    reasonseg_hub,
    refcoco,
)

LAYOUTS: dict[str, Callable[[Path, Source, str], Index]] = {
    "authors": authors.index_files,
    "cityscapes": cityscapes.index_files,
    "coco20i": coco20i.index_files,
    "mgrounding": mgrounding.index_files,
    "mig-bench": mig_bench.index_files,
    "photos": photos.index_files,
    "plain": plain.index_files,
    "reasonseg": reasonseg.index_files,
    "reasonseg-hf": reasonseg_hub.index_files,
    "refcoco": refcoco.index_files,
}

LISTED_SPLITS: dict[str, Callable[[Path, Source], tuple[str, ...]]] = {
    "photos": photos.list_splits,
    "plain": plain.list_splits,
}
"""Functions that list the splits of layouts in which only the data defines them."""

__all__ = ["LAYOUTS", "LISTED_SPLITS"]
