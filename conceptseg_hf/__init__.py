"""ConceptSeg for Transformers: concept segmentation from text prompts and reference images.

Importing this package registers its classes with `AutoConfig`, `AutoModel`, `AutoProcessor` and
`pipeline("concept-segmentation")`.
"""

from __future__ import annotations

import pathlib

from ._compat import ensure_torchvision

ensure_torchvision()  # must run before torchvision is imported

from transformers import AutoConfig, AutoModel, AutoProcessor  # noqa: E402

from .completion import Completion, format_completion, parse_completion  # noqa: E402
from .concept_prompt import ConceptPrompt  # noqa: E402
from .configuration_conceptseg import ConceptSegConfig, ConceptTranslationConfig  # noqa: E402
from .coprs import CoPRSConfig, CoPRSForSegmentation, CoPRSOutput, CoPRSProcessor  # noqa: E402
from .induction import induce  # noqa: E402
from .modeling_conceptseg import ConceptSegForSegmentation  # noqa: E402
from .outputs import ConceptSegmentation, ConceptSegOutput  # noqa: E402
from .pipelines import ConceptSegmentationPipeline, register_pipeline  # noqa: E402
from .processing_conceptseg import ConceptSegProcessor  # noqa: E402
from .references import Reference  # noqa: E402
from .router import ShortcutRouter  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CoPRSConfig",
    "CoPRSForSegmentation",
    "CoPRSOutput",
    "CoPRSProcessor",
    "Completion",
    "ConceptPrompt",
    "ConceptSegConfig",
    "ConceptSegForSegmentation",
    "ConceptSegOutput",
    "ConceptSegProcessor",
    "ConceptSegmentation",
    "ConceptSegmentationPipeline",
    "ConceptTranslationConfig",
    "Reference",
    "ShortcutRouter",
    "coprs_nano_checkpoint",
    "format_completion",
    "induce",
    "mini_checkpoint",
    "nano_checkpoint",
    "parse_completion",
    "register",
]


def nano_checkpoint() -> pathlib.Path:
    """Return the folder of the embedded checkpoint, a small model for demonstrations, tests and teaching."""
    return pathlib.Path(__file__).parent / "checkpoints" / "nano"


def mini_checkpoint() -> pathlib.Path:
    """Return the folder of the embedded checkpoint for photographs, for research and non-commercial use only."""
    return pathlib.Path(__file__).parent / "checkpoints" / "mini"


def coprs_nano_checkpoint() -> pathlib.Path:
    """Return the folder of the embedded CoPRS checkpoint, a small model for demonstrations, tests and teaching."""
    return pathlib.Path(__file__).parent / "checkpoints" / "coprs-nano"


def register() -> None:
    """Register the classes with Transformers. Repeated calls have no effect."""
    AutoConfig.register(ConceptTranslationConfig.model_type, ConceptTranslationConfig, exist_ok=True)
    AutoConfig.register(ConceptSegConfig.model_type, ConceptSegConfig, exist_ok=True)
    AutoModel.register(ConceptSegConfig, ConceptSegForSegmentation, exist_ok=True)
    AutoProcessor.register(ConceptSegConfig, ConceptSegProcessor, exist_ok=True)
    AutoConfig.register(CoPRSConfig.model_type, CoPRSConfig, exist_ok=True)
    AutoModel.register(CoPRSConfig, CoPRSForSegmentation, exist_ok=True)
    AutoProcessor.register(CoPRSConfig, CoPRSProcessor, exist_ok=True)
    register_pipeline(nano_checkpoint())


register()
