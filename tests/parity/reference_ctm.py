"""Reference implementation of the released Concept Translation Module, as functions of a dictionary of its tensors.

The queries q have shape (L2, C), the hidden states H (L1, C). One sample at a time, without masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEADS = 16


def layer_norm(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = (centered**2).mean(dim=-1, keepdim=True)
    return centered / torch.sqrt(variance + 1e-6) * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def attention(queries: Tensor, states: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    width = queries.shape[-1]
    q = linear(queries, tensors, f"{name}.q")
    kv = linear(states, tensors, f"{name}.kv")
    k, v = kv[:, :width], kv[:, width:]
    size = width // HEADS
    heads = []
    for head in range(HEADS):
        columns = slice(head * size, (head + 1) * size)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(size)
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        heads.append(weights / weights.sum(dim=-1, keepdim=True) @ v[:, columns])
    return linear(torch.cat(heads, dim=-1), tensors, f"{name}.proj")


def mlp(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    hidden = linear(x, tensors, f"{name}.fc1")
    return linear(hidden * torch.sigmoid(1.702 * hidden), tensors, f"{name}.fc2")


def translate(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
    """Compute the concept embeddings Z, (L2, 256), from the hidden states of one completion, (L1, C)."""
    q = tensors["learnable_query.param.weight"] + tensors["connector.pos_embed"][0]
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("connector.blocks."))
    for number in range(depth):
        block = f"connector.blocks.{number}"
        q = q + attention(
            layer_norm(q, tensors, f"{block}.norm0"),
            layer_norm(states, tensors, f"{block}.norm1"),
            tensors,
            f"{block}.attn",
        )
        q = q + mlp(layer_norm(q, tensors, f"{block}.norm2"), tensors, f"{block}.mlp")
    hidden = linear(q, tensors, "proj_to_sam.0")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return linear(hidden, tensors, "proj_to_sam.2")


def ctm_shapes(width: int, sam_width: int, num_queries: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of the released module."""
    shapes = {
        "learnable_query.param.weight": (num_queries, width),
        "connector.pos_embed": (1, num_queries, width),
    }

    def add_linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for number in range(depth):
        block = f"connector.blocks.{number}"
        for norm in ("norm0", "norm1", "norm2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (width,)
        add_linear(f"{block}.attn.q", width, width)
        add_linear(f"{block}.attn.kv", width, 2 * width)
        add_linear(f"{block}.attn.proj", width, width)
        add_linear(f"{block}.mlp.fc1", width, 4 * width)
        add_linear(f"{block}.mlp.fc2", 4 * width, width)
    add_linear("proj_to_sam.0", width, width)
    add_linear("proj_to_sam.2", width, sam_width)
    return shapes


def random_ctm(width: int, sam_width: int, num_queries: int, depth: int) -> dict[str, Tensor]:
    """Return random tensors with the names and shapes of the released module."""
    return {
        name: torch.randn(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in ctm_shapes(width, sam_width, num_queries, depth).items()
    }
