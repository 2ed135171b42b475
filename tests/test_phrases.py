"""Candidate phrases from prompts, answers and rules."""

from __future__ import annotations

from conceptseg_hf.phrases import Written, candidate_phrases, noun_phrases


def test_noun_phrases():
    assert noun_phrases("find the largest striped object") == [
        "largest striped object",
        "striped object",
        "object",
    ]
    assert noun_phrases("The red star, left of a small blue circle.") == [
        "red star",
        "star",
        "left",
        "small blue circle",
        "blue circle",
        "circle",
    ]
    assert noun_phrases("") == noun_phrases("find the") == []
    assert all(
        len(phrase.split()) <= 4 for phrase in noun_phrases("one very long run of red green blue words")
    )


def test_candidates_know_their_references():
    completions = [("red star", "find red"), ("red circle", None), (None, "find red"), ("red star", "")]
    phrases = candidate_phrases(" odd one ", [Written(i, *each) for i, each in enumerate(completions)])
    assert next(iter(phrases)) == "odd one" and phrases["odd one"] is None
    assert phrases["red star"] == {0, 3} and phrases["red circle"] == {1} == phrases["circle object"]
    assert phrases["red"] is None and phrases["red object"] is None  # the words that all answers share
    of_two = [Written(i // 2, *each) for i, each in enumerate(completions)]
    assert candidate_phrases("p", of_two)["red star"] == {0, 1}
    assert list(candidate_phrases("p", [Written(0, None, None)])) == ["p"]
