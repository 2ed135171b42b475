"""Candidate phrases for SAM 3 from prompts, answers and rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_MAX_PHRASE_WORDS = 4
_STOP_WORDS = frozenset(
    "a an the of in on at to from with without for by and or is are was be that this these those which it its there "
    "here not no any all each one find locate segment show shows shown mark marked marks region regions image images "
    "reference references target targets look looks same other others than as what".split()
)


class Written(NamedTuple):
    """What the VLM wrote for a reference as the target.

    Attributes:
        reference: Index of the reference.
        answer: The answer, or None.
        rule: The rule, or None.
    """

    reference: int
    answer: str | None
    rule: str | None


def candidate_phrases(prompt: str, written: Sequence[Written]) -> dict[str, frozenset[int] | None]:
    """Return candidate phrases: the prompt, answers and their words, phrases of rules, and words shared by all answers.

    Args:
        prompt: The user's prompt.
        written: Answers and rules.

    Returns:
        For each phrase the references that it comes from, or None if it does not come from single references.
    """
    sources: dict[str, set[int]] = {}
    for reference, answer, rule in written:
        words = (answer or "").split()
        parts = [*words, *(f"{word} object" for word in words)] if len(words) > 1 else []
        for phrase in [answer or "", *parts, *noun_phrases(rule or "")]:
            if phrase.strip():
                sources.setdefault(phrase.strip(), set()).add(reference)
    phrases: dict[str, frozenset[int] | None] = {
        phrase: frozenset(numbers) for phrase, numbers in sources.items()
    }
    answers = [each.answer for each in written if each.answer]
    common = [
        word for word in (answers[0].split() if answers else ()) if all(word in a.split() for a in answers)
    ]
    if common and len(answers) > 1:
        phrases |= {" ".join(common): None, f"{' '.join(common)} object": None}
    return {prompt.strip(): None} | phrases


def noun_phrases(text: str) -> list[str]:
    """Return runs of words between stop words and punctuation, and the last words of each run.

    Example:
        >>> noun_phrases("find the largest striped object")
        ['largest striped object', 'striped object', 'object']
    """
    phrases: list[str] = []
    for run in re.split(r"[^\w\s'-]", text.lower()):
        words: list[str] = []
        for word in [*run.split(), "the"]:
            if word not in _STOP_WORDS:
                words.append(word)
                continue
            phrases += [
                " ".join(words[start:])
                for start in range(len(words))
                if len(words) - start <= _MAX_PHRASE_WORDS
            ]
            words = []
    return list(dict.fromkeys(phrases))
