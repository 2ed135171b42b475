"""The figures printed in the paper, by table, from `paper_figures.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

METHODS = ("ConceptSeg-R1-7B", "ConceptSeg-R1-3B", "SAM 3")
"""The paper's own models and SAM 3, which they use; Table 1 has further methods."""


@cache
def _figures() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def groups() -> tuple[str, ...]:
    """Return the groups, which are the columns of Table 1, in its order."""
    return tuple(_figures()["groups"])


def data_sets(level: str | None = None) -> tuple[str, ...]:
    """Return the datasets of a level or of all levels, which are the columns of Table 8, in its order."""
    by_level = _figures()["data_sets"]
    return tuple(by_level[level]) if level else tuple(name for names in by_level.values() for name in names)


@cache
def table_1() -> dict[str, dict[str, dict[str, float | None]]]:
    """Return Table 1: method -> metric (f_w, miou) -> group, or "mean" -> percent."""
    return {
        method: {
            metric: dict(zip(groups(), row[metric], strict=True)) | {"mean": row["mean"][metric]}
            for metric in ("f_w", "miou")
        }
        for method, row in _figures()["table_1"].items()
    }


def table_3() -> dict[str, dict[str, dict[str, float | None]]]:
    """Return Table 3: method -> split of ReasonSeg -> metric (giou, ciou) -> percent."""
    return _figures()["table_3"]


@cache
def table_8() -> dict[str, dict[str, dict[str, float | None]]]:
    """Return Table 8: method -> metric -> dataset, or level for its mean -> percent."""
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
    """Return a table in the layout of the file; `number` is 1, 2, 3, 4, 8, 10, 11 or 12."""
    return _figures()[f"table_{number}"]
