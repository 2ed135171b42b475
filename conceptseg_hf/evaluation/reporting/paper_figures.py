"""The figures that the paper prints, by table; `paper_figures.yaml` holds them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

METHODS = ("ConceptSeg-R1-7B", "ConceptSeg-R1-3B", "SAM 3")
"""The paper's own models and their backbone; Table 1 has others as well."""


@cache
def _figures() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def groups() -> tuple[str, ...]:
    """The columns of Table 1, in its order."""
    return tuple(_figures()["groups"])


def data_sets(level: str | None = None) -> tuple[str, ...]:
    """The columns of Table 8, in its order; those of a level, or all."""
    found = _figures()["data_sets"]
    return tuple(found[level]) if level else tuple(name for names in found.values() for name in names)


def table_1() -> dict[str, dict[str, dict[str, float | None]]]:
    """Method -> metric (f_w, miou) -> group, or "mean" -> percent."""
    return {
        method: {
            metric: dict(zip(groups(), row[metric], strict=True)) | {"mean": row["mean"][metric]}
            for metric in ("f_w", "miou")
        }
        for method, row in _figures()["table_1"].items()
    }


def table_3() -> dict[str, dict[str, dict[str, float | None]]]:
    """Method -> split of ReasonSeg -> metric (giou, ciou) -> percent."""
    return _figures()["table_3"]


def table_8() -> dict[str, dict[str, dict[str, float | None]]]:
    """Method -> metric -> data set, or level for its mean -> percent."""
    levels = tuple(_figures()["data_sets"])
    return {
        method: {
            metric: {
                name: value
                for level in levels
                for name, value in zip(data_sets(level), row[level], strict=True)
            }
            | dict(zip(levels, row["mean"], strict=True))
            for metric, row in rows.items()
        }
        for method, rows in _figures()["table_8"].items()
    }


def table(number: int) -> dict[str, Any]:
    """A table as the file holds it: 1, 2, 3, 4, 8, 10, 11 or 12."""
    return _figures()[f"table_{number}"]
