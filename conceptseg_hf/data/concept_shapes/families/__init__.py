"""The task families of ConceptShapes: each function composes scenes into one task.

Families are grouped as the columns of the paper's Table 1. A family returns a `Task`: the target scene, the
true mask, the user's words, the references with their true boxes, and the ground-truth reasoning, which
always ends with the answer.
"""

from __future__ import annotations

from collections.abc import Callable

from .context_dependent import anomaly, camouflage, lesion, saliency, shadow, transparent
from .context_independent import absent, attribute
from .context_reasoning import (
    changed,
    common_attribute,
    differs,
    extreme_size,
    odd_one_out,
    relation,
    same_object,
    same_part,
    tracking,
    view,
)
from .task import Rng, Task, TaskRng

__all__ = ["GROUPS", "Family", "Task", "TaskRng"]

Family = Callable[[Rng, int, bool], Task]

# Level, group (a column of the paper's Table 1) and families, in the order in which a split goes through
# them. "Diverse classes" comes three times in a round because it holds the absent-object negatives too.
GROUPS: tuple[tuple[str, str, tuple[Family, ...]], ...] = (
    ("CI", "diverse classes", (attribute,)),
    ("CD", "optical property", (transparent, shadow)),
    ("CD", "camouflage", (camouflage,)),
    ("CD", "saliency", (saliency,)),
    ("CI", "diverse classes", (attribute,)),
    ("CD", "industrial anomaly", (anomaly,)),
    ("CD", "medical lesion", (lesion,)),
    ("CR", "consistency", (common_attribute, same_object, same_part)),
    ("CI", "diverse classes", (absent,)),
    ("CR", "difference", (changed, differs)),
    ("CR", "rationality", (relation, odd_one_out, extreme_size)),
    ("CR", "spatio-temporality", (tracking, view)),
)
