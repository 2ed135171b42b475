"""What a benchmark yields: one image, one concept, and the true mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..boxes import Box
from ..references import Reference


@dataclass(frozen=True)
class Candidate:
    """An object that could be taken for the target.

    Attributes:
        role: "target", or what kind of mistake choosing it would be.
        mask: (H, W) bool, its visible pixels.
    """

    role: str
    mask: np.ndarray


@dataclass(frozen=True)
class ConceptSample:
    """One item of a benchmark.

    Attributes:
        image: The target image, RGB.
        mask: The true mask, "L", 0 or 255, the size of the image; empty when the concept is absent.
        prompt: The words the user would type.
        level: "CI", "CD" or "CR" (paper, appendix A).
        group: A column of the paper's Table 1, such as "camouflage".
        family: The kind of task within the group.
        references: Reference images; every reference with a box or mask carries its true one, the proxy
            query included.
        dataset: Name of the benchmark.
        sample_id: Unique within the benchmark and split.
        box: (x1, y1, x2, y2) of the true mask in pixels of the image, x2 and y2 exclusive; None when the
            concept is absent.
        think: Ground-truth reasoning, where the benchmark has one.
        rule: Ground-truth rule, where the benchmark has one.
        answer: Ground-truth noun phrase, where the benchmark has one.
        split: The benchmark's split.
        ignore: "L", 255 where pixels do not count, the size of the image; None when all pixels count.
        box_only: The benchmark knows a box and no mask: `mask` is that box, filled, and no metric of masks
            may be computed from it.
        candidates: The target and the objects that could be taken for it, where the benchmark asks which one is meant.
        stratum: Part of the group whose results are reported apart.
        stored_mask: The true mask as it is stored, "L", where that has another size than the image; `mask` is then
            resized.
        reference_faults: What is wrong with references that were meant for the sample and cannot be used, a sentence
            each.
        references_lost: How many of these no other reference could replace.
        soft_mask: The true mask with its soft edges, "L", at the size that it is stored in; only where it has some, and
            the benchmark's loader keeps them.
    """

    image: Image.Image
    mask: Image.Image
    prompt: str
    level: str
    group: str
    family: str
    references: list[Reference] = field(default_factory=list)
    dataset: str = ""
    sample_id: str = ""
    box: Box | None = None
    think: str | None = None
    rule: str | None = None
    answer: str | None = None
    split: str = "test"
    ignore: Image.Image | None = None
    box_only: bool = False
    candidates: tuple[Candidate, ...] = ()
    stratum: str = ""
    stored_mask: Image.Image | None = None
    reference_faults: tuple[str, ...] = ()
    references_lost: int = 0
    soft_mask: Image.Image | None = None

    @property
    def present(self) -> bool:
        """Whether the image shows the concept at all."""
        return self.box is not None


class UnreadableSampleError(ValueError):
    """One sample of a benchmark cannot be read; the others can.

    Attributes:
        fields: What is known of it: those fields of its `ConceptSample` that need no pixels.
        truth: `mask`, `box`, `ignore` and `box_only` of its `ConceptSample` if the truth can be read, else
            None; at the size that it is stored in.
        stretched: The sample with its mask stretched to the image, where nothing is wrong but that their shapes differ;
            else None. For comparisons at a size that is neither's.
    """

    def __init__(
        self,
        message: str,
        fields: dict[str, Any] | None = None,
        ground_truth: dict[str, Any] | None = None,
        stretched: ConceptSample | None = None,
    ) -> None:
        super().__init__(message)
        self.fields = {"prompt": "", "level": "?", "group": "?", "family": "?"} | (fields or {})
        self.ground_truth = ground_truth
        self.stretched = stretched

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.fields, self.ground_truth, self.stretched)
