"""FiftyOne plugin @conceptseg/conceptseg: registers operators and the panel; the work is done in `conceptseg_hf`."""

from .benchmark import LoadConceptBenchmark
from .cancel import CancelRun
from .evaluate import EvaluateConcepts
from .explorer import ConceptExplorer
from .segment import ReleaseModel, SegmentConcept
from .uncertain import FindUncertain, ShowReferences


def register(plugin):
    """Called by FiftyOne."""
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
