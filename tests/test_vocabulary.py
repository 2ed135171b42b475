"""Tests of words that are not in a vocabulary."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conceptseg_hf import ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.vocabulary import unknown_words

KNOWN = ("red", "circle", "the", "cat", "s", "'")


@pytest.fixture(scope="module")
def processor() -> ConceptSegProcessor:
    return ConceptSegProcessor.from_pretrained(nano_checkpoint())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *KNOWN])}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red circle", []),
        ("the Red CIRCLE", []),
        ("red zebra", ["zebra"]),
        ("(zebra), red; Zebra!", ["zebra", "Zebra"]),
        ("zebra, zebra", ["zebra"]),
        ("the cat's circle", []),
        ("the zebra's x-ray", ["zebra's", "x-ray"]),
        ("red, circle?", []),  # punctuation is no word
        ("rot-weißer Kreis 圆", ["rot-weißer", "Kreis", "圆"]),
    ],
)
def test_unknown_words(tokenizer: PreTrainedTokenizerFast, text: str, expected: list[str]) -> None:
    assert unknown_words(tokenizer, text) == expected


@given(st.lists(st.sampled_from([*KNOWN[:4], "zebra", "x9", "ß"])))
def test_each_unknown_word_is_listed_once_in_order(
    tokenizer: PreTrainedTokenizerFast, words: list[str]
) -> None:
    expected = list(dict.fromkeys(word for word in words if word not in KNOWN))
    assert unknown_words(tokenizer, "  ".join(words)) == expected


def test_tokenizers_without_an_unknown_token_know_all_words(tokenizer: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert without.unk_token_id is None
    assert unknown_words(without, "zebra") == []


def test_processors_warn(processor: ConceptSegProcessor) -> None:
    image = Image.new("RGB", (40, 30))
    assert processor.unknown_words("a striped zebra") == ["zebra"]
    with pytest.warns(UserWarning, match="prompt 'a striped zebra': .* does not contain 'zebra'"):
        processor(image, "a striped zebra")
    with pytest.warns(UserWarning, match="'zebra'"):
        processor([image, image], ["striped cross", "a striped zebra"])


def test_prompts_of_concept_shapes_are_known(processor: ConceptSegProcessor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sample in load_benchmark("concept-shapes", split="test", limit=60):
            processor(sample.image, sample.prompt)
