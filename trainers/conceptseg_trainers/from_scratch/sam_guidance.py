"""Losses on the attention of SAM 3, so that it learns to compare words and boxes with image features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3Attention

from .masks import total


class SamAttention:
    """The inputs of SAM 3's cross-attentions during one forward pass.

    Args:
        sam: SAM 3.
    """

    def __init__(self, sam: Sam3Model) -> None:
        self._fusion = [cast(Sam3Attention, layer.cross_attn) for layer in sam.detr_encoder.layers]
        self._decoder = [cast(Sam3Attention, layer.vision_cross_attn) for layer in sam.detr_decoder.layers]
        self._inputs: list[dict[str, Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the inputs while SAM 3 is called once."""
        self._inputs = []
        hooks = [
            attention.register_forward_pre_hook(
                lambda _, __, kwargs: self._inputs.append(kwargs), with_kwargs=True
            )
            for attention in (*self._fusion, *self._decoder)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def prompt_loss(self, targets: Tensor, guided: Tensor) -> Tensor:
        """Compute the loss of image tokens that attend to wrong tokens of the prompt, averaged over the fusion layers.

        Args:
            targets: (B, heads, N, T) bool: the correct prompt tokens of each head and image token.
            guided: (B, heads) bool: the heads that have targets.
        """
        pairs = zip(self._fusion, self._inputs)
        return total(_guided_attention_loss(*pair, targets, guided) for pair in pairs) / len(self._fusion)

    def presence_loss(self, object_tokens: Tensor, present: Tensor) -> Tensor:
        """Compute the loss of a presence token that attends elsewhere than to the object, averaged over the layers.

        Args:
            object_tokens: (B, N) bool, the image tokens of the object.
            present: (B,) bool, the rows that contribute to the loss.
        """
        pairs = zip(self._decoder, self._inputs[len(self._fusion) :])
        return total(_presence_attention_loss(*pair, object_tokens, present) for pair in pairs) / len(
            self._decoder
        )


def _attention_scores(attention: Sam3Attention, query: Tensor, key: Tensor) -> Tensor:
    """Return the attention logits without a mask, (B, heads, queries, keys)."""

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)

    scores = split_heads(attention.q_proj(query)) @ split_heads(attention.k_proj(key)).transpose(2, 3)
    return (scores * attention.scaling).float()


def _guided_attention_loss(
    attention: Sam3Attention, inputs: dict[str, Tensor], targets: Tensor, guided: Tensor
) -> Tensor:
    """Compute -log of the attention of the guided heads to the target tokens, averaged over image tokens.

    Args:
        attention: The cross-attention of one fusion layer.
        inputs: Arguments that it was called with.
        targets: (B, heads, N, T) bool; see `SamAttention.prompt_loss`.
        guided: (B, heads) bool.
    """
    scores = _attention_scores(attention, inputs["query"], inputs["key"])
    mask = inputs["attention_mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    log_attention = scores.log_softmax(-1).masked_fill(~targets, float("-inf"))
    loss = -log_attention.logsumexp(-1)[guided]
    # Image tokens of objects have few targets; they are rare, and have the same total weight as all others.
    few = (2 * targets.sum(-1) < targets.shape[-1])[guided]
    return 0.5 * (loss[few].mean() + loss[~few].mean())


def _presence_attention_loss(
    attention: Sam3Attention, inputs: dict[str, Tensor], object_tokens: Tensor, present: Tensor
) -> Tensor:
    """Compute -log of the attention of the presence token, the first query, to the object, for half of the heads.

    Args:
        attention: The cross-attention to image tokens of one decoder layer.
        inputs: Arguments that it was called with.
        object_tokens: (B, N) bool, the image tokens of the object.
        present: (B,) bool, the rows that contribute to the loss.
    """
    heads = attention.num_attention_heads // 2
    scores = _attention_scores(attention, inputs["query"][:, :1], inputs["key"])[:, :heads, 0]
    if inputs["attention_mask"] is not None:
        scores = scores + inputs["attention_mask"][:, :heads, 0]
    log_attention = scores.log_softmax(-1).masked_fill(~object_tokens[:, None], float("-inf"))
    return -log_attention[present].logsumexp(-1).mean()
