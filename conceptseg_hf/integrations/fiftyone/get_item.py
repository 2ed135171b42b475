"""Input of FiftyOne's data loader. Import this module lazily: FiftyOne imports torchvision here."""

from __future__ import annotations

from typing import Any

import fiftyone.utils.torch as fout


class GetFilepath(fout.GetItem):
    """Returns the path of the image file; the pipeline reads the file and reports unreadable ones."""

    @property
    def required_keys(self) -> list[str]:
        """Sample fields to read."""
        return ["filepath"]

    def __call__(self, d: dict[str, Any]) -> str:
        """Return the path."""
        return d["filepath"]
