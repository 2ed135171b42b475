"""Our Concept Translation Module matches the reference implementation with the same tensors."""

from __future__ import annotations

import pytest
import torch

from conceptseg_hf import ConceptTranslationConfig
from conceptseg_hf.concept_translation import ConceptTranslationModule
from conceptseg_hf.conversion.names import from_original, to_original

from .reference_ctm import ctm_shapes, random_ctm, translate

pytestmark = pytest.mark.parity


def load(tensors, width, num_queries, depth, sam_width) -> ConceptTranslationModule:
    config = ConceptTranslationConfig(
        hidden_size=width, num_queries=num_queries, num_layers=depth, sam_hidden_size=sam_width
    )
    module = ConceptTranslationModule(config)
    module.load_state_dict({from_original(name)[len("ctm.") :]: value for name, value in tensors.items()})
    return module.eval()


@pytest.mark.parametrize(
    ("width", "num_queries", "depth", "sam_width"), [(64, 8, 4, 32), (128, 1, 4, 64), (32, 16, 2, 256)]
)
@torch.no_grad()
def test_concept_tokens_match_the_reference(width, num_queries, depth, sam_width):
    torch.manual_seed(0)
    tensors = random_ctm(width, sam_width, num_queries, depth)
    module = load(tensors, width, num_queries, depth, sam_width)
    states = torch.randn(3, 11, width) * 2
    lengths = [11, 7, 1]
    mask = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    concepts = module(states, mask)
    for row, length in enumerate(lengths):  # padding has no effect
        expected = translate(tensors, states[row, :length])
        torch.testing.assert_close(concepts[row], expected, atol=2e-5, rtol=1e-4)
        assert expected.std() > 0.1
    assert not torch.allclose(concepts[0], concepts[1], atol=1e-3)


def test_names_and_shapes_match_the_released_module():
    shapes = ctm_shapes(3584, 256, 8, 4)
    with torch.device("meta"):
        module = ConceptTranslationModule(ConceptTranslationConfig(hidden_size=3584))
    ours = {to_original(f"ctm.{name}"): tuple(value.shape) for name, value in module.state_dict().items()}
    assert ours == shapes
