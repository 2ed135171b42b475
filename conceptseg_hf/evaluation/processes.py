"""Deprecated: import from `conceptseg_hf.evaluation.distributed`."""

import warnings

from .distributed import ALONE as ALONE
from .distributed import Processes as Processes
from .distributed import join_processes as join_processes

warnings.warn(
    "conceptseg_hf.evaluation.processes is deprecated; import from conceptseg_hf.evaluation.distributed.",
    FutureWarning,
    stacklevel=2,
)
