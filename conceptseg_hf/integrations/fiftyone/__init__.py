"""FiftyOne integration: a model for `apply_model`, an evaluation backend, importers, and the plugin's loop.

Requires `pip install conceptseg-hf[fiftyone]`. The plugin `@conceptseg/conceptseg` contains only forms and views; every
operation that it offers is also available through the functions and classes exported here.
"""

from .benchmarks import load_concept_benchmark
from .checkpoints import get_pipeline, release_models
from .concept_library import (
    StoredConcept,
    concept_names,
    delete_concept,
    export_concept,
    import_concept,
    load_concept,
    rename_concept,
    save_concept,
)
from .concepts import (
    ConceptEdit,
    InductionJob,
    concept_job,
    edit_concept,
    induce_concept,
    last_settings,
    reference_scores,
)
from .evaluation import ConceptSegEvaluationConfig, evaluate_concepts, register_evaluation_backend
from .job import SegmentationJob
from .loop import cancel_segmentation, segment_collection
from .model import ConceptSegFiftyOneModel
from .model_zoo import install_zoo_models
from .other_route import segment_other_route
from .progress import Progress
from .reference_samples import references_from, view_with_references
from .schema import declare_prediction_fields
from .uncertainty import find_uncertain

register_evaluation_backend()

__all__ = [
    "ConceptEdit",
    "ConceptSegEvaluationConfig",
    "ConceptSegFiftyOneModel",
    "InductionJob",
    "Progress",
    "SegmentationJob",
    "StoredConcept",
    "cancel_segmentation",
    "concept_job",
    "concept_names",
    "declare_prediction_fields",
    "delete_concept",
    "edit_concept",
    "evaluate_concepts",
    "export_concept",
    "find_uncertain",
    "get_pipeline",
    "import_concept",
    "induce_concept",
    "install_zoo_models",
    "last_settings",
    "load_concept",
    "load_concept_benchmark",
    "reference_scores",
    "references_from",
    "register_evaluation_backend",
    "release_models",
    "rename_concept",
    "save_concept",
    "segment_collection",
    "segment_other_route",
    "view_with_references",
]
