"""FiftyOne plugin @conceptseg/conceptseg: operators and a panel; the implementation is in `conceptseg_hf`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import LoadConceptBenchmark
from .cancel import CancelRun
from .evaluate import EvaluateConcepts
from .explorer import ConceptExplorer
from .segment import ReleaseModel, SegmentConcept
from .uncertain import FindUncertain, ShowReferences

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext


def register(plugin: PluginContext) -> None:
    """Register the operators and the panel; called by FiftyOne."""
    for operator in (
        SegmentConcept,
        EvaluateConcepts,
        LoadConceptBenchmark,
        FindUncertain,
        ShowReferences,
        CancelRun,
        ReleaseModel,
        ConceptExplorer,
    ):
        plugin.register(operator)
