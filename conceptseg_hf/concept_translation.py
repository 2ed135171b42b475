"""The Concept Translation Module (CTM), which maps hidden states of the VLM to concept tokens for SAM 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_conceptseg import ConceptTranslationConfig


class ConceptCrossAttention(nn.Module):
    """Multi-head cross-attention of concept queries to hidden states, with a joint key-value projection."""

    def __init__(self, config: ConceptTranslationConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)  # keys first
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attend from (B, L2, C) queries to (B, L1, C) states; the mask broadcasts to (B, heads, L2, L1)."""

        def split_heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = split_heads(self.q(queries))
        k, v = (split_heads(x) for x in self.kv(states).chunk(2, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class ConceptMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ConceptTranslationConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_ratio * config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.mlp_ratio * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return self.fc2(self.activation(self.fc1(x)))


class ConceptTranslationBlock(nn.Module):
    """Pre-norm cross-attention, then a pre-norm MLP; no self-attention among the queries."""

    def __init__(self, config: ConceptTranslationConfig) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_states = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = ConceptCrossAttention(config)
        self.norm_mlp = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ConceptMLP(config)

    def forward(self, queries: Tensor, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Update the (B, L2, C) queries by attending to the states."""
        queries = queries + self.attn(self.norm_queries(queries), self.norm_states(states), attention_mask)
        return queries + self.mlp(self.norm_mlp(queries))


class ConceptTranslationModule(nn.Module):
    """Learnable concept queries that attend to hidden states (eq. 3) and are projected to SAM 3's prompt space.

    The architecture matches the released weights: queries plus a position embedding, four cross-attention blocks, and a
    two-layer projection.
    """

    def __init__(self, config: ConceptTranslationConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.queries = nn.Parameter(torch.empty(config.num_queries, width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.blocks = nn.ModuleList(ConceptTranslationBlock(config) for _ in range(config.num_layers))
        self.proj_to_sam = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.sam_hidden_size)
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Translate hidden states into concept tokens.

        Args:
            hidden_states: (B, L1, C) states of the completion tokens.
            attention_mask: (B, L1), true at completion tokens; None to attend to all states.

        Returns:
            (B, L2, D) concept tokens Z; D is the width of SAM 3's prompt space.
        """
        dtype = self.queries.dtype
        hidden_states = hidden_states.to(dtype)
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()
            # The softmax of a row without completion tokens would be NaN, so such a row attends to its padding.
            mask = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
        concepts = (self.queries + self.position_embedding).expand(hidden_states.shape[0], -1, -1)
        for block in self.blocks:
            concepts = block(concepts, hidden_states, mask)
        return self.proj_to_sam(concepts)
