"""Pipeline stub for tests of the segmentation loop."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from conceptseg_hf.outputs import ConceptSegmentation


class FakePipeline:
    """Replaces `ConceptSegmentationPipeline`: `segment` maps a list of inputs to the fields of their results."""

    def __init__(self, segment: Callable[..., list[dict[str, Any]]]) -> None:
        self._segment_inputs = segment
        self.processor = None
        self.model = SimpleNamespace(segment=self._segment)

    def preprocess(self, item: dict[str, Any]) -> dict[str, Any]:
        return item

    def _segment(
        self, samples: list[dict[str, Any]], processor: None, **settings: Any
    ) -> list[ConceptSegmentation]:
        return [ConceptSegmentation(**fields) for fields in self._segment_inputs(samples, **settings)]
