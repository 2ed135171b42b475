"""FiftyOne plugin @conceptseg/conceptseg: operators and panels; the implementation is in `conceptseg_hf`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .benchmark import LoadConceptBenchmark
from .cancel import CancelRun
from .concepts import ApplyConcept, EditConcept, InduceConcept
from .evaluate import EvaluateConcepts
from .explorer import ConceptExplorer
from .library import ConceptLibrary, ManageConcepts
from .segment import ReleaseModel, SegmentConcept
from .uncertain import FindUncertain, ShowReferences

if TYPE_CHECKING:
    from fiftyone.plugins.context import PluginContext


def register(plugin: PluginContext) -> None:
    """Register the operators and the panel; called by FiftyOne."""
    for operator in (
        SegmentConcept,
        InduceConcept,
        ApplyConcept,
        EditConcept,
        ManageConcepts,
        EvaluateConcepts,
        LoadConceptBenchmark,
        FindUncertain,
        ShowReferences,
        CancelRun,
        ReleaseModel,
        ConceptExplorer,
        ConceptLibrary,
    ):
        plugin.register(operator)
