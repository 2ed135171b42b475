"""How a predicted mask and a true one are brought together before they are compared.

| | `"standard"` | `"paper"` |
|---|---|---|
| size | the truth's | 600 x 600; where truths say what to ignore (ReasonSeg, Cityscapes), the truth's |
| prediction | probabilities, where there are some; foreground above 0.5 | thresholded first, everywhere |
| errors inside F_w | real numbers | whole numbers: misses near the border cost nothing |

An evaluation resizes SAM 3's logits to 600 x 600 and thresholds them there, as the paper does; masks that come without
logits are resized themselves, which moves borders by a pixel here and there.

`"paper"` follows the code that made the paper's figures; its scores compare with those and with nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..suggestions import did_you_mean


@dataclass(frozen=True)
class Protocol:
    """One way to compare masks.

    Attributes:
        name: Its name.
        size: Side of the square to which masks are resized, or None.
        binary: Whether predictions are thresholded before all metrics.
        whole_number_errors: See `weighted_f_measure`.
    """

    name: str
    size: int | None = None
    binary: bool = False
    whole_number_errors: bool = False

    def prepare(
        self, prediction: np.ndarray, truth: np.ndarray, counted: np.ndarray, keep_size: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Brings a prediction, its truth, and where it counts, all (H, W), to the size of comparison.

        Args:
            prediction: Probabilities or bool; it may have the size of comparison already.
            truth: Bool.
            counted: Bool.
            keep_size: Compare at the truth's size.
        """
        if self.size is not None and not keep_size:
            prediction, truth = self._resize(prediction) > 0.5, self._resize(truth) > 0.5
            counted = np.ones_like(truth)
        if self.binary and prediction.dtype != bool:
            prediction = prediction > 0.5
        return prediction, truth, counted

    def threshold(self, logits: np.ndarray) -> np.ndarray:
        """The mask of (h, w) logits at the size of comparison, bool."""
        return self._resize(logits) > 0

    def _resize(self, values: np.ndarray) -> np.ndarray:
        """Bilinear between pixel centres."""
        if values.shape == (self.size, self.size):
            return values
        image = torch.from_numpy(values.astype(np.float32))[None, None]
        return nn.functional.interpolate(image, size=(self.size, self.size), mode="bilinear")[0, 0].numpy()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("standard"),
        Protocol("paper", size=600, binary=True, whole_number_errors=True),
    )
}


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
