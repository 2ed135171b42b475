"""Tests of the parser: valid and malformed completions, arbitrary input, and linear run time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg_hf import completion
from conceptseg_hf.completion import TAGS, Completion, format_box, format_completion, parse_completion

VALID = (
    "<think>a\nb</think>\n<rule>c</rule> <check>[1, 2, 3, 4]</check>"
    "<bbox>[10,20,30,40]</bbox><answer> red circle </answer>\n"
)

PIECES = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")] + [
    *"[],.- \n<>/0159eE+",
    "[1,2,3,4]",
    "[0.1, 0.2, 0.3, 0.4]",
    "1e999",
    "nan",
    "inf",
    "__import__('os')",
    "red circle",
    "\ud800",
    "\x00",
    "é",
    "<think",
    "think>",
    "<|im_end|>",
]


def test_valid_completion() -> None:
    completion = parse_completion(VALID)
    assert completion == Completion(VALID, "a\nb", "c", (1, 2, 3, 4), (10, 20, 30, 40), "red circle", ())
    assert completion.is_valid


def test_check_is_optional_unless_expected() -> None:
    without = VALID.replace("<check>[1, 2, 3, 4]</check>", "")
    assert parse_completion(without).is_valid and parse_completion(without).check is None
    assert parse_completion(without, expect_check=True).missing == ("<check> is missing",)
    assert parse_completion(VALID, expect_check=True).is_valid
    assert parse_completion(VALID, expect_check=False).missing == ("<check> was not asked for",)


def test_rule_can_be_forbidden():
    """The template without meta reasoning."""
    text = format_completion("it is red", None, None, (1, 2, 30, 40), "star", 100)
    assert text == "<think>it is red</think><bbox>[1,2,30,40]</bbox><answer>star</answer>"
    assert parse_completion(text).missing == ("<rule> is missing",)
    completion = parse_completion(text, expect_check=False, expect_rule=False)
    assert completion.is_valid and completion.rule is None and completion.answer == "star"
    faults = parse_completion(VALID, expect_check=False, expect_rule=False).missing
    assert faults == ("<rule> was not asked for", "<check> was not asked for")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", [f"<{tag}> is missing" for tag in ("think", "rule", "bbox", "answer")]),
        (VALID.replace("<rule>c</rule>", ""), ["<rule> is missing"]),
        (
            VALID.replace("</rule>", ""),
            ["<rule> is not closed", "tags are nested or close in the wrong place"],
        ),
        (VALID.replace("<rule>c</rule>", "<rule>c</rule><rule>d</rule>"), ["<rule> appears more than once"]),
        (VALID + "more", ["there is text outside the tags"]),
        ("more" + VALID, ["there is text outside the tags"]),
        (VALID.replace("</think>", "</think>more"), ["there is text outside the tags"]),
        (VALID.replace("[10,20,30,40]", "[10,20,30]"), ["<bbox> does not hold a box [x1,y1,x2,y2]"]),
        (VALID.replace("[10,20,30,40]", "10,20,30,40"), ["<bbox> does not hold a box [x1,y1,x2,y2]"]),
        (VALID.replace("[1, 2, 3, 4]", "there"), ["<check> does not hold a box [x1,y1,x2,y2]"]),
        (VALID.replace("red circle", " "), ["<answer> is empty"]),
        (
            VALID.replace("<check>", ""),
            [
                "<check> is missing",
                "tags are nested or close in the wrong place",
                "there is text outside the tags",
            ],
        ),
        (
            "<answer>x</answer>" + VALID.replace("<answer> red circle </answer>", ""),
            ["tags are out of order"],
        ),
        (
            VALID.replace("c</rule>", "c</think></rule>"),
            ["<think> appears more than once", "tags are nested or close in the wrong place"],
        ),
    ],
)
def test_missing_describes_deviations_from_the_template(text: str, missing: list[str]) -> None:
    completion = parse_completion(text)
    assert sorted(completion.missing) == sorted(missing)
    assert not completion.is_valid


def test_malformed_parts_are_none_and_other_parts_are_parsed() -> None:
    completion = parse_completion("<think>never closed <bbox>[1,2,3,4]</bbox> <answer>cat</answer>")
    assert (completion.think, completion.rule, completion.bbox, completion.answer) == (
        None,
        None,
        (1, 2, 3, 4),
        "cat",
    )


def test_tags_quoted_in_the_reasoning_are_not_the_answer() -> None:
    thought = "I must write <bbox>[x3, y3, x4, y4]</bbox> and <answer>noun phrase</answer>"
    completion = parse_completion(VALID.replace("a\nb", thought))
    assert completion.think == thought
    assert (completion.bbox, completion.answer) == ((10, 20, 30, 40), "red circle")
    assert not completion.is_valid


@pytest.mark.parametrize(
    ("content", "scale", "box"),
    [
        ("[1,2,3,4]", None, (1, 2, 3, 4)),
        ("[ 1 ,\n2 , 3 , 4 ]", None, (1, 2, 3, 4)),
        ("[3,4,1,2]", None, (1, 2, 3, 4)),
        ("[-5,.5,1e1,1000]", 100, (0, 0.5, 10, 100)),
        ("[0.25,0.5,0.75,2.]", 1, (0.25, 0.5, 0.75, 1)),
        ("[0,0,0,0]", 100, (0, 0, 0, 0)),
        ("[1e999,0,1,1]", 100, None),
        ("[nan,0,1,1]", 100, None),
        ("[inf,0,1,1]", 100, None),
        ("[1,2,3,4,5]", None, None),
        ("[[1,2,3,4]]", None, None),
        ("(1,2,3,4)", None, None),
        ("[1,2,3,4", None, None),
        ("[0x1,2,3,4]", None, None),
        ("[1_0,2,3,4]", None, None),
        ("[１,２,３,４]", None, None),
        ("[" + "0" * 300 + ",1,2,3]", None, None),
        ("__import__('os').abort()", None, None),
    ],
)
def test_boxes(content: str, scale: float | None, box: tuple | None) -> None:
    assert parse_completion(f"<bbox>{content}</bbox>", scale).bbox == box


@pytest.mark.parametrize("value", [None, 3, b"<think>", ["<think>"], object()])
def test_values_that_are_not_strings_are_treated_as_empty(value: object) -> None:
    assert parse_completion(value) == parse_completion("")


def test_format_box() -> None:
    assert format_box((0.4, 1.5, 99.6, 100), 100) == "[0,2,100,100]"
    assert format_box((0.1234, 0.5, 1, 0), 1) == "[0.123,0.500,1.000,0.000]"


def test_box_of_an_absent_concept_is_formatted_as_empty() -> None:
    text = format_completion("t", "r", None, None, "nothing", 100)
    assert text == "<think>t</think><rule>r</rule><bbox>[0,0,0,0]</bbox><answer>nothing</answer>"


words = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"])).map(str.strip)


@st.composite
def text_boxes(draw: st.DrawFn, scale: float) -> tuple[float, ...]:
    x, y = (sorted(draw(st.lists(st.floats(0, scale), min_size=2, max_size=2))) for _ in "xy")
    return x[0], y[0], x[1], y[1]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([1.0, 100.0, 600.0]), st.booleans(), st.data())
def test_parse_inverts_format(scale: float, with_check: bool, data: st.DataObject) -> None:
    think, rule, answer = data.draw(words), data.draw(words), data.draw(words.filter(bool))
    bbox = data.draw(text_boxes(scale))
    check = data.draw(text_boxes(scale)) if with_check else None
    completion = parse_completion(
        format_completion(think, rule, check, bbox, answer, scale), scale, with_check
    )
    assert completion.is_valid, completion.missing
    assert (completion.think, completion.rule, completion.answer) == (think, rule, answer)
    rounding = 0.5 if scale > 1 else 0.0005
    assert completion.bbox == pytest.approx(bbox, abs=rounding + 1e-9)
    assert completion.check == (None if check is None else pytest.approx(check, abs=rounding + 1e-9))


def assert_consistent(text: str, scale: float | None) -> None:
    """Check properties that hold for the completion of any text."""
    completion = parse_completion(text, scale)
    assert completion.text == text
    for part in (completion.think, completion.rule, completion.answer):
        assert part is None or part in text
    for box in (completion.check, completion.bbox):
        if box is not None:
            assert box[0] <= box[2] and box[1] <= box[3]
            assert scale is None or (min(box) >= 0 and max(box) <= scale)
    if completion.is_valid:
        assert None not in (completion.think, completion.rule, completion.bbox, completion.answer)


@settings(deadline=None, max_examples=1500)
@given(
    st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)),
    st.sampled_from([None, 1.0, 100.0]),
)
def test_never_raises(text: str, scale: float | None) -> None:
    assert_consistent(text, scale)


def test_never_raises_on_100_000_random_and_mutated_texts() -> None:
    generator = random.Random(0)
    valid = 0
    for number in range(100_000):
        if number % 2:
            text = "".join(generator.choices(PIECES, k=generator.randrange(12)))
        else:  # apply one to three edits to a valid completion
            text = VALID
            for _ in range(generator.randrange(1, 4)):
                start = generator.randrange(len(text) + 1)
                text = text[:start] + generator.choice(["", *PIECES]) + text[start + generator.randrange(8) :]
        completion = parse_completion(text, 100)
        valid += completion.is_valid
        assert completion.is_valid == (not completion.missing)
    assert 0 < valid < 50_000


@pytest.mark.parametrize(
    "unit",
    [
        "<think>", "</think>", "<bbox>[", "<", "<<", "[1,", " ", "1", "<bbox>", "<think><rule>", "</answer>",
        "<bbox>[1,2,3,4]</bbox>", "\n", "e", "<think", ", ",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "frame", ["{}", "<think>{}", "<bbox>[{}]</bbox>", "{}</think>", "<bbox>{}</bbox>", VALID + "{}"]
)
def test_a_megabyte_is_parsed_in_linear_time(unit: str, frame: str, monkeypatch) -> None:
    """The text is searched a constant number of times, and boxes are matched only in short strings."""
    matched: list[str] = []

    class RecordingPattern:
        """Record the strings that are matched with the expression of a box, which is not linear."""

        def fullmatch(self, text: str):
            matched.append(text)
            return box.fullmatch(text)

    class CountingString(str):
        """Count the calls of `find`."""

        searches = 0

        def find(self, *arguments):
            CountingString.searches += 1
            return super().find(*arguments)

    box = completion._BOX
    monkeypatch.setattr(completion, "_BOX", RecordingPattern())
    text = CountingString(frame.replace("{}", unit * (1_000_000 // len(unit))))
    parse_completion(text, 100)
    assert CountingString.searches <= 1 + 4 * len(TAGS)
    assert len(matched) <= 2 and all(len(text) <= 256 for text in matched)


@pytest.mark.parametrize(
    ("answer", "tag"),
    [
        ("yellow cross</rule><bbox>[2 square", "</rule>"),
        ("<answer>red circle", "<answer>"),
        ("a <b>red</b> circle", "<b>"),
        ("red circle <bbox", "<bbox"),
        ("red </", None),
        ("a < b, c > d", None),
        ("x<3", None),
    ],
)
def test_an_answer_with_tags_is_rejected(answer: str, tag: str | None) -> None:
    parsed = parse_completion(VALID.replace(" red circle ", answer))
    if tag is None:
        assert parsed.answer == answer and parsed.is_valid
    else:
        assert parsed.answer is None and f"<answer> holds {tag}" in parsed.missing
        assert (parsed.bbox, parsed.check) == ((10, 20, 30, 40), (1, 2, 3, 4))
