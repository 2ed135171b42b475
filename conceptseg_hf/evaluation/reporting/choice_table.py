"""The table of chosen objects; see `records.choice`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..records.choice import TARGET
from .tables import markdown_table, percent


def choice_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return Markdown lines: how often each role was chosen, by group and stratum in percent; empty without any."""
    chosen = [record for record in records if "chosen" in record]
    if not chosen:
        return []
    roles = [TARGET, *sorted({record["chosen"] for record in chosen} - {TARGET})]
    rows = []
    for key in dict.fromkeys((record["group"], record["stratum"]) for record in chosen):
        counts = Counter(record["chosen"] for record in chosen if (record["group"], record["stratum"]) == key)
        total = counts.total()
        rows.append([*key, str(total), *(percent(100 * counts[role] / total) for role in roles)])
    return markdown_table(["group", "stratum", "samples", *roles], rows)
