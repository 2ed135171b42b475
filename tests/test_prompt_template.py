"""Templates are data: complete, round-tripping, filled without surprises."""

from __future__ import annotations

import json

import pytest

from conceptseg_hf.prompt_template import (
    OFFICIAL_TEMPLATE,
    PromptTemplate,
    load_prompt_template,
    released_template,
)

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


LISTED = "[[382, 110, 478, 190], [12, 310, 140, 420]]"
# Another wording in the released structure: one frame with slots, and one of its own without references.
FRAMES = """
system: "Be brief. "
frame: |
  Find "{question}".
  References{ref_bboxes}.{check_prompt}
  Write {check_answer}<bbox>.
frames:
  no_reference: Find "{question}" without references.
slots:
  with_proxy:
    ref_bboxes: " have boxes at {reference_box_list}"
    check_prompt: " Find the first box."
    check_answer: "<rule></rule><check></check>"
  support_only: {ref_bboxes: " at {reference_box_list}", check_prompt: "", check_answer: "<rule></rule>"}
  single_reference: {ref_bboxes: "", check_prompt: "", check_answer: "<rule></rule>"}
"""


def test_a_file_of_frames_and_slots(tmp_path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(FRAMES)
    template = load_prompt_template(path)
    assert template.system == "Be brief. "
    assert template.fill("with_proxy", "{check_prompt}", "none", LISTED) == (
        f'Find "{{check_prompt}}".\nReferences have boxes at {LISTED}. Find the first box.\n'
        "Write <rule></rule><check></check><bbox>.\n"
    )
    assert template.fill("single_reference", "x") == 'Find "x".\nReferences.\nWrite <rule></rule><bbox>.\n'
    assert template.fill("no_reference", "x") == 'Find "x" without references.'
    (tmp_path / "words.json").write_text(json.dumps(template.to_dict()))
    assert load_prompt_template(tmp_path / "words.json") == template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "frame: 'Find {question} {where}'",
            r"'.*words.yaml': .*slot \{where\}, which slots.with_proxy",
        ),
        ("slots: {}", "there is no frame for with_proxy"),
        ("frame: 'Find it'\nsystem: s", r"with_proxy lacks \{problem\}"),
        ("frame: 'Find {question}'", "system is a NoneType"),
        ("frame: 'Find {question}'\nword: x", "'word' means nothing here"),
        ("[1, 2]", "holds no fields"),
        ("a: [", "neither YAML nor JSON"),
        ("system: x", "give exactly"),
    ],
)
def test_files_that_hold_no_template(tmp_path, content, message) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompt_template(path)
    with pytest.raises(FileNotFoundError, match=r"'missing\.yaml' is not a file"):
        load_prompt_template("missing.yaml")


def test_the_released_structure() -> None:
    """Boxes are one list of Python; one frame for all ways of references, so what is left out leaves the rest."""
    template = released_template()
    texts = {variant: template.fill(variant, "the odd one", "none", LISTED) for variant in VARIANTS}
    assert [variant for variant in VARIANTS if LISTED in texts[variant]] == ["with_proxy", "support_only"]
    assert [variant for variant in VARIANTS if "<check>" in texts[variant]] == ["with_proxy"]
    assert "none at" not in texts["with_proxy"] and all("the odd one" in text for text in texts.values())
    head, tail = texts["single_reference"].split("Reference image")
    assert texts["with_proxy"].startswith(f"{head}Reference image: ") and tail.startswith(".\n")
