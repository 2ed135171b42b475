"""Candidate phrases for SAM 3 from prompts, answers and rules."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MAX_PHRASE_WORDS = 4
_STOP_WORDS = frozenset(
    "a an the of in on at to from with without for by and or is are was be that this these those which it its there "
    "here not no any all each one find locate segment show shows shown mark marked marks region regions image images "
    "reference references target targets look looks same other others than as what".split()
)


def candidate_phrases(
    prompt: str, completions: Sequence[tuple[str | None, str | None]], num_samples: int = 1
) -> dict[str, frozenset[int] | None]:
    """Return candidate phrases: the prompt, answers and their words, phrases of rules, and words shared by all answers.

    Args:
        prompt: The user's prompt.
        completions: Answer and rule of each completion, or None; `num_samples` for each reference.
        num_samples: Completions per reference.

    Returns:
        For each phrase the references that it comes from, or None if it does not come from single references.
    """
    sources: dict[str, set[int]] = {}
    for number, (answer, rule) in enumerate(completions):
        words = (answer or "").split()
        parts = [*words, *(f"{word} object" for word in words)] if len(words) > 1 else []
        for phrase in [answer or "", *parts, *noun_phrases(rule or "")]:
            if phrase.strip():
                sources.setdefault(phrase.strip(), set()).add(number // num_samples)
    phrases: dict[str, frozenset[int] | None] = {
        phrase: frozenset(numbers) for phrase, numbers in sources.items()
    }
    answers = [answer for answer, _ in completions if answer]
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
