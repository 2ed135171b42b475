"""The task families of ConceptShapes: each function combines scenes into one task.

Families are grouped by the columns of the paper's Table 1. A family returns a `Task`: the target scene, the
ground-truth mask, the prompt, the references with their ground-truth boxes, and the ground-truth reasoning, which
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
from .hidden_rule import coexistence, hidden_rule
from .task import Task, TaskRng
from .which_one import (
    beside,
    distance,
    extreme_kin,
    inside_ring,
    marked_kin,
    named_kin,
    new_kin,
    ordinal,
    tracked_twin,
)

__all__ = ["FURTHER_GROUPS", "GROUPS", "TABLE_1_GROUPS", "VARIANTS", "Family", "Task", "TaskRng"]

Family = Callable[..., Task]

# Level, group (a column of the paper's Table 1) and families, in the order in which a split cycles through them.
# "Diverse classes" occurs three times in a round because it also contains the negatives with absent objects.
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

TABLE_1_GROUPS = tuple(dict.fromkeys(group for _, group, _ in GROUPS))

# Groups outside Table 1, generated only if selected by name; results of strata are reported separately.
FURTHER_GROUPS: dict[str, tuple[str, dict[str, tuple[Family, ...]]]] = {
    "which one": (
        "CR",
        {
            "shared noun": (marked_kin, named_kin, extreme_kin, new_kin),
            "identical look": (beside, ordinal, distance, tracked_twin, inside_ring, coexistence),
        },
    ),
    "hidden rule": ("CR", {"": (hidden_rule,)}),
}

# Number of variants of families in which several consecutive samples have the same target.
VARIANTS: dict[Family, int] = {coexistence: 2}
