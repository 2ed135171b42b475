"""Deprecated: import from `conceptseg_hf.loading`."""

import warnings

from ..loading import find_checkpoint as find_checkpoint
from ..loading import load_config as load_config
from ..loading import load_model_and_processor as load_model_and_processor

warnings.warn(
    "conceptseg_hf.evaluation.loading is deprecated; import from conceptseg_hf.loading.",
    FutureWarning,
    stacklevel=2,
)
