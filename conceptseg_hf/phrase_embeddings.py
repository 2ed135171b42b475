"""Explicit prompt embeddings of phrases, which SAM 3 computes once for all images with the same phrase."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from transformers import Sam3Model

from .hashing import weights, weights_counters
from .sam_prompt import encode_text

_MAX_PHRASES = 1024


class PhraseEmbeddings:
    """The embeddings E_text of the phrases of earlier calls; they are dropped when the weights of SAM 3 change.

    They are kept only if SAM 3 is in eval mode and all weights of its text encoder are in memory: changes of weights
    that are offloaded or divided among processes cannot be detected.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}
        self._state: Hashable = None

    def encode(
        self, sam: Sam3Model, input_ids: Tensor, attention_mask: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Encode phrases without gradient on a device; see `sam_prompt.encode_text`."""
        tensors = list(weights(sam.text_encoder, sam.text_projection))
        if sam.text_encoder.training or any(tensor.is_meta or not tensor.numel() for tensor in tensors):
            with torch.no_grad():
                return encode_text(sam, input_ids.to(device), attention_mask.to(device))
        state = weights_counters(tensors)
        if state != self._state or len(self._kept) > _MAX_PHRASES:
            self._kept, self._state = {}, state
        kept = self._kept
        inference = torch.is_inference_mode_enabled()  # its tensors cannot be used for training
        keys = [
            (inference, *row) for row in torch.cat([input_ids, attention_mask.to(input_ids)], dim=1).tolist()
        ]
        missing = {key: row for row, key in enumerate(keys) if key not in kept}
        if missing:
            rows = torch.tensor(list(missing.values()), device=input_ids.device)
            with torch.no_grad():
                embeds, _ = encode_text(sam, input_ids[rows].to(device), attention_mask[rows].to(device))
            # Copies, since views would keep the embeddings of the whole batch in memory.
            kept.update((key, row.clone()) for key, row in zip(missing, embeds))
        return torch.stack([kept[key] for key in keys]), attention_mask.to(device).bool()
