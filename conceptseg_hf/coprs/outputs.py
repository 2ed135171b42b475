"""Output of `CoPRSForSegmentation.forward`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CoPRSOutput(ModelOutput):
    """Output of `CoPRSForSegmentation.forward`.

    Attributes:
        loss: Scalar L_SEG (eq. 8), returned if mask labels are given.
        prior_logits: (B, 1, H, W) logits of the positional prior at the resolution of the mask prompt.
        mask_logits: (B, 1, H, W) mask logits.
        has_position: (B,) bool, whether the completion contains the concentration token. The other rows have the prior
            and the mask of a zero state, and are excluded from the losses.
        concentration_states: (B, C) hidden states of the concentration tokens.
        logits: (B, L, V) the VLM's next-token logits, returned if `output_logits=True`.
        prior_loss: Scalar cross-entropy of the prior.
        dice_loss: Scalar dice term.
        focal_loss: Scalar focal term.
    """

    loss: Tensor | None = None
    prior_logits: Tensor | None = None
    mask_logits: Tensor | None = None
    has_position: Tensor | None = None
    concentration_states: Tensor | None = None
    logits: Tensor | None = None
    prior_loss: Tensor | None = None
    dice_loss: Tensor | None = None
    focal_loss: Tensor | None = None
