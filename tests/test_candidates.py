"""Selection of candidates by how well they explain the references."""

from __future__ import annotations

import pytest
import torch

from conceptseg_hf.candidates import Candidate, Scored, score_table, select_candidate

REFERENCES = range(4)


def scored(phrase: str, ious: tuple[float, ...], sources: set[int] | None = None, **options) -> Scored:
    candidate = Candidate(phrase, phrase, sources=None if sources is None else frozenset(sources), **options)
    counted = candidate.counted(len(REFERENCES))
    return Scored(candidate, ious, presences=ious, counted=counted)


def selected(*candidates: Scored) -> tuple[str, ...]:
    return select_candidate(candidates)[1]


@pytest.mark.parametrize(
    ("first", "second", "phrase"),
    [
        # As good as each other: the words of all answers, more references, fewer words.
        (("glass star", (0.8, 0.8, 0.8, 0.8), {0, 1}), ("glass", (0.79, 0.79, 0.79, 0.79), None), "glass"),
        (
            ("star", (0.8, 0.8, 0.8, 0.8), {0, 1}),
            ("red star", (0.79, 0.79, 0.79, 0.79), {0, 1, 2}),
            "red star",
        ),
        (("red star", (0.8, 0.8, 0.8, 0.8), {0, 1}), ("star", (0.79, 0.79, 0.79, 0.79), {2, 3}), "star"),
        # Clearly better.
        (("glass star", (0.8, 0.8, 0.8, 0.8), {0, 1}), ("glass", (0.7, 0.7, 0.8, 0.8), None), "glass star"),
        # The first one has a higher score, as the hard reference does not count for it.
        (("dotted star", (0.8, 0.6, 0.8, 0.8), {1}), ("star", (0.8, 0.6, 0.8, 0.8), {1, 2}), "star"),
        # The second one has a higher score, but is worse on the references that count for both.
        (("dotted star", (0.7, 0.1, 0.75, 0.75), {1}), ("star", (0.7, 0.9, 0.72, 0.72), {1, 2}), "star"),
    ],
)
def test_the_simplest_of_equal_candidates_is_selected(first, second, phrase):
    assert selected(scored(*first), scored(*second)) == selected(scored(*second), scored(*first)) == (phrase,)


def test_phrases_are_simpler_than_tokens():
    tokens = scored("star", (0.81, 0.81, 0.81, 0.81), tokens=torch.zeros(4, 8))
    phrase = scored("red star", (0.8, 0.8, 0.8, 0.8))
    assert select_candidate([tokens, phrase])[0] is phrase
    better = scored("star", (0.85, 0.85, 0.85, 0.85), tokens=torch.zeros(4, 8))
    assert select_candidate([better, phrase])[0] is better
    assert [row.score for row in score_table([phrase, tokens, better])] == pytest.approx([0.8, 0.85, 0.81])


def test_phrases_are_combined_only_if_this_is_clearly_better():
    hole, stain = scored("hole", (0.9, 0.9, 0.0, 0.0)), scored("stain", (0.0, 0.0, 0.9, 0.9))
    best, phrases = select_candidate([hole, stain])
    assert phrases == ("hole", "stain") and best.ious == (0.9, 0.9, 0.9, 0.9)
    star, red_star = scored("star", (0.9, 0.9, 0.88, 0.88)), scored("red star", (0.88, 0.88, 0.9, 0.9))
    assert selected(star, red_star) == ("star",), "together 0.90, alone 0.89"
