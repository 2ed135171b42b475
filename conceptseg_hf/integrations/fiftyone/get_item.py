"""What FiftyOne's data loader hands to the model. Imports torchvision by way of FiftyOne, so it is imported late."""

from __future__ import annotations

from typing import Any

import fiftyone.utils.torch as fout


class GetFilepath(fout.GetItem):
    """The name of the image's file: the pipeline reads it, and says which ones cannot be read."""

    @property
    def required_keys(self) -> list[str]:
        """The sample fields that are read."""
        return ["filepath"]

    def __call__(self, d: dict[str, Any]) -> str:
        """The path."""
        return d["filepath"]
