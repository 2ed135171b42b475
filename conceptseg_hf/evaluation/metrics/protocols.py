"""How a predicted mask and a true one are brought together before they are compared.

- `"standard"`: at the truth's size. Where predictions are probabilities, MAE, F_w and S-measure see them; foreground is
  what exceeds 0.5. Pixels that a truth says to ignore do not count.
- `"paper"`: at 600 x 600 (where truths say what to ignore, at the truth's size); truths resized by torch (bilinear,
  above 0.5); predictions thresholded first. Errors inside F_w are whole numbers: misses near the border cost nothing.
- `"released"`: as `"paper"`, and further as the released code has it. Truths are resized by Pillow (bicubic, above
  127), with the grey values of soft ones. ReasonSeg, in both of its forms, is compared at the image's own size; SAM 3
  gets its images from Pillow (bicubic), and its logits are resized by bicubic interpolation. Other sets are compared as
  if there were no pixels to ignore. S-measure has population variances and an epsilon of 1e-8, which costs small
  objects. BER takes a class that does not occur as wrong throughout: 0.5 for an image without the concept where nothing
  is found.

An evaluation resizes SAM 3's logits to 600 x 600 and thresholds them there; masks that come without logits are resized
themselves, which moves borders by a pixel here and there.

The paper's figures compare with `"released"` alone; docs/weights.md says how far `"paper"` is from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...suggestions import did_you_mean


@dataclass(frozen=True)
class Protocol:
    """One way to compare masks.

    Attributes:
        name: Its name.
        size: Side of the square to which masks are resized, or None.
        binary: Whether predictions are thresholded before all metrics.
        integer_errors: See `weighted_f_measure`.
        bicubic_ground_truths: Whether truths are resized by Pillow (bicubic), with the grey values of soft ones.
        released_measures: Whether S-measure and BER are those of the released code.
        own_size: Data sets that are compared at the image's own size, and whose images SAM 3 gets from Pillow.
        ignores: Whether pixels to ignore do not count in other sets.
    """

    name: str
    size: int | None = None
    binary: bool = False
    integer_errors: bool = False
    bicubic_ground_truths: bool = False
    released_measures: bool = False
    own_size: frozenset[str] = frozenset()
    ignores: bool = True

    def prepare(
        self,
        prediction: np.ndarray,
        ground_truth: np.ndarray,
        counted: np.ndarray,
        keep_size: bool,
        soft_ground_truth: Image.Image | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Brings a prediction, its truth, and where it counts, all (H, W), to the size of comparison.

        Args:
            prediction: Probabilities or bool; it may have the size of comparison already.
            ground_truth: Bool.
            counted: Bool.
            keep_size: Compare at the truth's size.
            soft_ground_truth: The truth with its soft edges, "L", where there is one.
        """
        if self.size is not None and not keep_size:
            prediction = _resize(prediction, self.size) > 0.5
            ground_truth = self._resize_ground_truth(ground_truth, soft_ground_truth, self.size)
            counted = np.ones_like(ground_truth)
        if self.binary and prediction.dtype != bool:
            prediction = prediction > 0.5
        return prediction, ground_truth, counted

    def threshold(self, logits: np.ndarray) -> np.ndarray:
        """The mask of (h, w) logits at the size of comparison, bool."""
        assert self.size is not None  # the others compare at the truth's size
        return _resize(logits, self.size) > 0

    def _resize_ground_truth(
        self, ground_truth: np.ndarray, soft_ground_truth: Image.Image | None, side: int
    ) -> np.ndarray:
        if not self.bicubic_ground_truths:
            return _resize(ground_truth, side) > 0.5
        picture = (
            Image.fromarray(ground_truth.astype(np.uint8) * 255)
            if soft_ground_truth is None
            else soft_ground_truth
        )
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) > 127


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("standard"),
        Protocol("paper", size=600, binary=True, integer_errors=True),
        Protocol(
            "released",
            size=600,
            binary=True,
            integer_errors=True,
            bicubic_ground_truths=True,
            released_measures=True,
            own_size=frozenset({"reasonseg", "reasonseg-hf"}),
            ignores=False,
        ),
    )
}


def _resize(values: np.ndarray, side: int) -> np.ndarray:
    """Bilinear between pixel centres."""
    if values.shape == (side, side):
        return values
    image = torch.from_numpy(values.astype(np.float32))[None, None]
    return nn.functional.interpolate(image, size=(side, side), mode="bilinear")[0, 0].numpy()


def get_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"no protocol is named {name!r}{did_you_mean(name, PROTOCOLS)}; use one of {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]
