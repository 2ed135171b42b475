from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from conceptseg_hf import ConceptTranslationConfig
from conceptseg_hf.concept_translation import ConceptTranslationModule


@pytest.fixture
def ctm() -> ConceptTranslationModule:
    torch.manual_seed(0)
    module = ConceptTranslationModule(
        ConceptTranslationConfig(
            hidden_size=32, num_attention_heads=4, num_queries=5, num_layers=2, sam_hidden_size=16
        )
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def reference(weights: dict[str, Tensor], states: Tensor, heads: int, layers: int) -> Tensor:
    """Reference implementation of the CTM for one completion (L1, C), without library attention."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    z = weights["queries"] + weights["position_embedding"][0]
    width = z.shape[1] // heads
    for layer in range(layers):
        block = f"blocks.{layer}"
        q, kv = (
            linear(norm(z, f"{block}.norm_queries"), f"{block}.attn.q"),
            linear(norm(states, f"{block}.norm_states"), f"{block}.attn.kv"),
        )
        k, v = kv[:, : z.shape[1]], kv[:, z.shape[1] :]
        attended = []
        for head in range(heads):
            span = slice(head * width, (head + 1) * width)
            attended.append(torch.softmax(q[:, span] @ k[:, span].T / math.sqrt(width), -1) @ v[:, span])
        z = z + linear(torch.cat(attended, 1), f"{block}.attn.proj")
        hidden = linear(norm(z, f"{block}.norm_mlp"), f"{block}.mlp.fc1")
        z = z + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.fc2")
    hidden = linear(z, "proj_to_sam.0")
    return linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), "proj_to_sam.2")


def test_equals_the_reference_implementation(ctm: ConceptTranslationModule) -> None:
    states = torch.randn(7, 32)
    expected = reference(dict(ctm.state_dict()), states, heads=4, layers=2)
    torch.testing.assert_close(ctm(states[None])[0], expected, rtol=1e-4, atol=1e-5)


def test_padding_is_not_attended(ctm: ConceptTranslationModule) -> None:
    states = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    batched = ctm(states, mask)
    torch.testing.assert_close(batched[:1], ctm(states[:1, :4]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batched[1:], ctm(states[1:]), rtol=1e-5, atol=1e-6)


def test_a_row_without_tokens_is_finite(ctm: ConceptTranslationModule) -> None:
    concepts = ctm(torch.randn(1, 3, 32), torch.zeros(1, 3, dtype=torch.bool))
    assert concepts.shape == (1, 5, 16)
    assert torch.isfinite(concepts).all()


def test_all_parameters_have_gradients(ctm: ConceptTranslationModule) -> None:
    ctm(torch.randn(2, 6, 32)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in ctm.named_parameters()
        if not name.endswith("kv.bias")
    )


def test_states_of_another_dtype_are_accepted(ctm: ConceptTranslationModule) -> None:
    assert ctm(torch.randn(1, 4, 32, dtype=torch.bfloat16)).dtype == torch.float32
