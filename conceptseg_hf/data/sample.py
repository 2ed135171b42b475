"""Samples of a benchmark: an image, a concept and its ground-truth mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..boxes import Box
from ..references import Reference


@dataclass(frozen=True)
class Candidate:
    """An object that could be mistaken for the target.

    Attributes:
        role: "target", or the kind of mistake that choosing it would be.
        mask: Its visible pixels, (H, W) bool.
    """

    role: str
    mask: np.ndarray


@dataclass(frozen=True)
class ConceptSample:
    """One sample of a benchmark.

    Attributes:
        image: The target image, RGB.
        mask: The ground-truth mask, "L", 0 or 255, at the size of the image; empty when the concept is absent.
        prompt: The user prompt.
        level: "CI", "CD" or "CR" (paper, appendix A).
        group: A column of the paper's Table 1, such as "camouflage".
        family: The kind of task within the group.
        references: Reference images. Their boxes and masks are ground truth, including that of the proxy query.
        dataset: Name of the benchmark.
        sample_id: Unique within the benchmark and split.
        box: (x1, y1, x2, y2) of the ground-truth mask in pixels of the image, x2 and y2 exclusive; None when the
            concept is absent.
        think: Ground-truth reasoning, if the benchmark provides it.
        rule: Ground-truth rule, if the benchmark provides it.
        answer: Ground-truth noun phrase, if the benchmark provides it.
        split: Split of the benchmark.
        ignore: "L", 255 for ignored pixels, at the size of the image; None when all pixels count.
        box_only: Whether the ground truth is a box without a mask. `mask` is then the filled box, and no mask metric
            may be computed from it.
        candidates: The target and the objects that could be mistaken for it, if the benchmark asks which one is meant.
        stratum: Part of the group; results of strata are reported separately.
        stored_mask: The ground-truth mask as stored, "L", if its size differs from that of the image; `mask` is then
            resized.
        reference_faults: One sentence for each reference that was selected for the sample but cannot be used.
        references_lost: Number of these that could not be replaced.
        soft_mask: The ground-truth mask with its soft edges, "L", at its stored size; None if it has none or the loader
            of the benchmark does not keep them.
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
        """Whether the concept is present in the image."""
        return self.box is not None


class UnreadableSampleError(ValueError):
    """Raised when one sample of a benchmark cannot be read; other samples are not affected.

    Attributes:
        fields: Fields of its `ConceptSample` that need no pixels.
        ground_truth: `mask`, `box`, `ignore` and `box_only` of its `ConceptSample`, at the stored size; None if the
            ground truth cannot be read.
        stretched: The sample with its mask stretched to the size of the image, if only their aspect ratios differ; else
            None. It is used by protocols that resize images and masks to a fixed size.
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
