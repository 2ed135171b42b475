"""Tests of prompt templates: contents, serialization and filling."""

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
def test_official_template_requests_the_expected_parts(variant: str) -> None:
    text = OFFICIAL_TEMPLATE.fill(variant, "the odd one", "[1,2,3,4]")
    assert "{" not in text and 'matching "the odd one"' in text
    assert ("[1,2,3,4]" in text) == (variant in ("with_proxy", "support_only"))
    assert ("<check>" in text) == ("missed bounding box in the top-left" in text) == (variant == "with_proxy")
    tags = ["<think>", "</think>", "<rule>", "</rule>", "<bbox>", "</bbox>", "<answer>", "</answer>"]
    positions = [text.index(tag) for tag in tags]
    assert positions == sorted(positions)


def test_official_system_text() -> None:
    assert OFFICIAL_TEMPLATE.system == "You are a helpful assistant."


def test_placeholders_in_the_prompt_are_not_replaced() -> None:
    prompt = "{reference_boxes} {problem} {0} {} \\1"
    assert prompt in OFFICIAL_TEMPLATE.fill("with_proxy", prompt, "[1,2,3,4]")


def test_from_dict_rejects_missing_and_unknown_fields() -> None:
    data = OFFICIAL_TEMPLATE.to_dict()
    del data["system"]
    with pytest.raises(ValueError, match=r"use exactly .*'system'"):
        PromptTemplate.from_dict(data)
    with pytest.raises(ValueError, match="'extra'"):
        PromptTemplate.from_dict({**OFFICIAL_TEMPLATE.to_dict(), "extra": "x"})


def test_template_must_contain_the_problem_placeholder() -> None:
    with pytest.raises(ValueError, match=r"no_reference lacks \{problem\}"):
        PromptTemplate("s", "{problem}", "{problem}", "{problem}", "segment it")
    with pytest.raises(ValueError, match="system is a NoneType"):
        PromptTemplate(None, "{problem}", "{problem}", "{problem}", "{problem}")


BOX_LIST = "[[382, 110, 478, 190], [12, 310, 140, 420]]"
# A different wording in the released structure: a frame with slots, and a separate frame without references.
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


def test_load_a_file_with_frames_and_slots(tmp_path) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(FRAMES)
    template = load_prompt_template(path)
    assert template.system == "Be brief. "
    assert template.fill("with_proxy", "{check_prompt}", "none", BOX_LIST) == (
        f'Find "{{check_prompt}}".\nReferences have boxes at {BOX_LIST}. Find the first box.\n'
        "Write <rule></rule><check></check><bbox>.\n"
    )
    assert template.fill("single_reference", "x") == 'Find "x".\nReferences.\nWrite <rule></rule><bbox>.\n'
    assert template.fill("no_reference", "x") == 'Find "x" without references.'
    (tmp_path / "template.json").write_text(json.dumps(template.to_dict()))
    assert load_prompt_template(tmp_path / "template.json") == template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "frame: 'Find {question} {where}'",
            r"'.*template.yaml': .*slot \{where\}; set it in slots.with_proxy",
        ),
        ("slots: {}", "no frame for with_proxy"),
        ("frame: 'Find it'\nsystem: s", r"with_proxy lacks \{problem\}"),
        ("frame: 'Find {question}'", "system is a NoneType"),
        ("frame: 'Find {question}'\nword: x", "unknown key 'word'; use one of system"),
        ("[1, 2]", "contains no fields"),
        ("a: [", "neither valid YAML nor JSON"),
        ("system: x", "use exactly"),
    ],
)
def test_rejects_invalid_template_files(tmp_path, content, message) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompt_template(path)
    with pytest.raises(FileNotFoundError, match=r"'missing\.yaml' is not a file"):
        load_prompt_template("missing.yaml")


def test_released_template() -> None:
    """Boxes are a Python list, and all variants with references share a frame whose slots may be empty."""
    template = released_template()
    texts = {variant: template.fill(variant, "the odd one", "none", BOX_LIST) for variant in VARIANTS}
    assert [variant for variant in VARIANTS if BOX_LIST in texts[variant]] == ["with_proxy", "support_only"]
    assert [variant for variant in VARIANTS if "<check>" in texts[variant]] == ["with_proxy"]
    assert "none at" not in texts["with_proxy"] and all("the odd one" in text for text in texts.values())
    head, tail = texts["single_reference"].split("Reference image")
    assert texts["with_proxy"].startswith(f"{head}Reference image: ") and tail.startswith(".\n")
