"""Protocols: how predicted and ground truth masks are resized and thresholded before they are compared.

- `"standard"`: compares at the size of the ground truth. If predictions are probabilities, MAE, F_w and S-measure are
  computed on them, and the other metrics threshold them at 0.5. Pixels that the ground truth ignores do not count.
- `"paper"`: compares at 600 x 600 (at the size of the ground truth if it has pixels to ignore). Ground truths are
  resized with torch (bilinear, threshold 0.5), and predictions are thresholded first. Errors inside F_w are integers,
  so misses near the border cost nothing.
- `"released"`: like `"paper"`, with further details of the released code. Ground truths are resized with Pillow
  (bicubic, threshold 127), soft ones with their gray values. Both versions of ReasonSeg are compared at the size of the
  image; their images are resized for SAM 3 with Pillow (bicubic), and the logits are resized by bicubic interpolation.
  In the other datasets, pixels to ignore count as well. S-measure uses population variances and an epsilon of 1e-8,
  which lowers the scores of small objects. BER counts a class without pixels as entirely wrong: it is 0.5 for an empty
  prediction on an image without the concept.

An evaluation resizes SAM 3's logits to 600 x 600 and thresholds them there. Masks without logits are resized
themselves, which can shift borders by a pixel.

Only `"released"` is comparable with the paper's figures; docs/weights.md quantifies how `"paper"` differs from it.
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
        name: Name of the protocol.
        size: Side of the square to which masks are resized, or None.
        binary: Whether predictions are thresholded before all metrics.
        integer_errors: The option `integer_errors` of `weighted_f_measure`.
        bicubic_ground_truths: Whether ground truths are resized with Pillow (bicubic), soft ones with gray values.
        released_measures: Whether S-measure and BER follow the released code.
        own_size: Datasets that are compared at the size of their images, which Pillow resizes for SAM 3.
        ignores: Whether pixels to ignore are excluded in the other datasets.
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
        valid: np.ndarray,
        keep_size: bool,
        soft_ground_truth: Image.Image | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Resize a prediction, its ground truth and its valid pixels, all (H, W), to the size of comparison.

        Args:
            prediction: Probabilities or bool; it may already have the size of comparison.
            ground_truth: Bool.
            valid: Bool, the pixels that count.
            keep_size: Compare at the size of the ground truth.
            soft_ground_truth: The ground truth with soft edges, mode "L", if available.
        """
        if self.size is not None and not keep_size:
            prediction = _resize(prediction, self.size) > 0.5
            ground_truth = self._resize_ground_truth(ground_truth, soft_ground_truth, self.size)
            valid = np.ones_like(ground_truth)
        if self.binary and prediction.dtype != bool:
            prediction = prediction > 0.5
        return prediction, ground_truth, valid

    def threshold(self, logits: np.ndarray) -> np.ndarray:
        """Return the mask of (h, w) logits at the size of comparison, bool."""
        assert self.size is not None  # the other protocols compare at the size of the ground truth
        return _resize(logits, self.size) > 0

    def _resize_ground_truth(
        self, ground_truth: np.ndarray, soft_ground_truth: Image.Image | None, side: int
    ) -> np.ndarray:
        if not self.bicubic_ground_truths:
            return _resize(ground_truth, side) > 0.5
        image = (
            Image.fromarray(ground_truth.astype(np.uint8) * 255)
            if soft_ground_truth is None
            else soft_ground_truth
        )
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) > 127


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
    """Resize to a square by bilinear interpolation between pixel centers."""
    if values.shape == (side, side):
        return values
    image = torch.from_numpy(values.astype(np.float32))[None, None]
    return nn.functional.interpolate(image, size=(side, side), mode="bilinear")[0, 0].numpy()


def get_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        ValueError: If there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"no protocol is named {name!r}{did_you_mean(name, PROTOCOLS)}; use one of {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]
