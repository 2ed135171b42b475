"""Templates are data: complete, round-tripping, filled without surprises."""

from __future__ import annotations

import json

import pytest

from conceptseg_hf.prompt_template import OFFICIAL_TEMPLATE, PromptTemplate

VARIANTS = ("with_proxy", "support_only", "single_reference", "no_reference")


def test_round_trip_through_json() -> None:
    assert PromptTemplate.from_dict(json.loads(json.dumps(OFFICIAL_TEMPLATE.to_dict()))) == OFFICIAL_TEMPLATE


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_template_asks_for_what_it_should(variant: str) -> None:
    text = OFFICIAL_TEMPLATE.fill(variant, "the odd one", "[1,2,3,4]")
    assert "{" not in text and 'matching "the odd one"' in text
    assert ("[1,2,3,4]" in text) == (variant in ("with_proxy", "support_only"))
    assert ("<check>" in text) == ("missed bounding box in the top-left" in text) == (variant == "with_proxy")
    tags = ["<think>", "</think>", "<rule>", "</rule>", "<bbox>", "</bbox>", "<answer>", "</answer>"]
    positions = [text.index(tag) for tag in tags]
    assert positions == sorted(positions)


def test_official_system_text() -> None:
    assert OFFICIAL_TEMPLATE.system == "You are a helpful assistant."


def test_placeholders_in_the_users_words_stay() -> None:
    words = "{reference_boxes} {problem} {0} {} \\1"
    assert words in OFFICIAL_TEMPLATE.fill("with_proxy", words, "[1,2,3,4]")


def test_from_dict_refuses_other_fields() -> None:
    data = OFFICIAL_TEMPLATE.to_dict()
    del data["system"]
    with pytest.raises(ValueError, match=r"give exactly .*'system'"):
        PromptTemplate.from_dict(data)
    with pytest.raises(ValueError, match="'extra'"):
        PromptTemplate.from_dict({**OFFICIAL_TEMPLATE.to_dict(), "extra": "x"})


def test_a_template_must_place_the_users_words() -> None:
    with pytest.raises(ValueError, match=r"no_reference lacks \{problem\}"):
        PromptTemplate("s", "{problem}", "{problem}", "{problem}", "segment it")
    with pytest.raises(ValueError, match="system is a NoneType"):
        PromptTemplate(None, "{problem}", "{problem}", "{problem}", "{problem}")
