"""Tests of the embeddings of phrases that are kept between calls."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Sam3Model

from conceptseg_hf import ConceptSegConfig
from conceptseg_hf import phrase_embeddings as module
from conceptseg_hf.phrase_embeddings import PhraseEmbeddings
from conceptseg_hf.sam_prompt import encode_text

CPU = torch.device("cpu")


class Encodings:
    """Count the phrases that the text encoder reads."""

    def __init__(self, sam: Sam3Model) -> None:
        self.counts: list[int] = []
        sam.text_encoder.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, encoder, args, kwargs) -> None:
        self.counts.append(len(kwargs["input_ids"]))


@pytest.fixture()
def sam() -> Sam3Model:
    torch.manual_seed(0)
    config = ConceptSegConfig.from_preset("nano").sam_config
    return Sam3Model._from_config(config).eval().requires_grad_(False)


@pytest.fixture()
def phrases() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 0 and 2 are equal; row 3 differs from row 1 only in its mask."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (4, 6))
    ids[2], ids[3] = ids[0], ids[1]
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[3, 4:] = 0
    return ids, mask


def assert_encoded(sam, encoded, ids, mask) -> None:
    embeds, text_mask = encoded
    expected, expected_mask = encode_text(sam, ids, mask)
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(text_mask, expected_mask) and text_mask.dtype == torch.bool


def test_each_phrase_is_encoded_once(sam, phrases) -> None:
    ids, mask = phrases
    encodings, embeddings = Encodings(sam), PhraseEmbeddings()
    first = embeddings.encode(sam, ids, mask, CPU)
    assert encodings.counts == [3]
    assert_encoded(sam, first, ids, mask)
    rows = torch.tensor([3, 0])
    encodings.counts.clear()
    again = embeddings.encode(sam, ids[rows], mask[rows], CPU)
    assert encodings.counts == []
    assert_encoded(sam, again, ids[rows], mask[rows])
    assert not torch.equal(first[0][1], first[0][3]), "the mask is part of a phrase"


def write_in_place(sam: Sam3Model) -> None:
    with torch.no_grad():
        next(sam.text_encoder.parameters()).mul_(2)


def write_the_projection(sam: Sam3Model) -> None:
    with torch.no_grad():
        sam.text_projection.bias.add_(1)


def replace_a_weight(sam: Sam3Model) -> None:
    sam.text_projection.weight = torch.nn.Parameter(2 * sam.text_projection.weight, requires_grad=False)


def load_weights(sam: Sam3Model) -> None:
    sam.load_state_dict({name: value + 0.1 for name, value in copy.deepcopy(sam.state_dict()).items()})


def change_the_dtype(sam: Sam3Model) -> None:
    sam.double()


@pytest.mark.parametrize(
    "change", [write_in_place, write_the_projection, replace_a_weight, load_weights, change_the_dtype]
)
def test_embeddings_are_dropped_when_weights_change(sam, phrases, change) -> None:
    embeddings = PhraseEmbeddings()
    before, _ = embeddings.encode(sam, *phrases, CPU)
    change(sam)
    after = embeddings.encode(sam, *phrases, CPU)
    assert_encoded(sam, after, *phrases)
    assert before.dtype != after[0].dtype or not torch.allclose(before, after[0], atol=1e-4)


def test_nothing_is_kept_in_training_mode(sam, phrases) -> None:
    encodings, embeddings = Encodings(sam.train()), PhraseEmbeddings()
    for _ in range(2):
        assert_encoded(sam, embeddings.encode(sam, *phrases, CPU), *phrases)
    assert encodings.counts == [4, 4] * 2  # each time once by `assert_encoded`


def test_nothing_is_kept_if_weights_are_not_in_memory(sam, phrases) -> None:
    encodings, embeddings = Encodings(sam), PhraseEmbeddings()
    sam.text_encoder.register_buffer("partitioned", torch.zeros(0))
    for _ in range(2):
        embeddings.encode(sam, *phrases, CPU)
    assert encodings.counts == [4, 4]


def test_phrases_of_inference_mode_can_be_used_in_training(sam, phrases) -> None:
    embeddings = PhraseEmbeddings()
    with torch.inference_mode():
        embeddings.encode(sam, *phrases, CPU)
    embeds, _ = embeddings.encode(sam, *phrases, CPU)
    weight = torch.ones(embeds.shape[-1], requires_grad=True)
    (embeds * weight).sum().backward()  # fails for tensors of inference mode
    torch.testing.assert_close(weight.grad, embeds.sum((0, 1)))


def test_their_number_is_limited(sam, phrases, monkeypatch) -> None:
    monkeypatch.setattr(module, "_MAX_PHRASES", 3)
    encodings, embeddings = Encodings(sam), PhraseEmbeddings()
    ids, mask = phrases
    for first in range(4):
        embeddings.encode(sam, ids + first, mask, CPU)
    assert encodings.counts == [3, 3, 3, 3]
    assert len(embeddings._kept) <= 6
