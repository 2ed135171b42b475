from __future__ import annotations

import pytest

from conceptseg_hf.router import ROUTER_MODES, ShortcutRouter


@pytest.mark.parametrize(
    ("prompt", "threshold"),
    [
        ("circle", 0.1),
        ("red circle", 0.2),
        ("large red circle", 0.4),
        ("the large red circle", 0.8),
        ("the one large red circle", 1.0),
        ("word " * 5000, 1.0),
        ("", 0.1),
        ("  red \t circle\n", 0.2),
        ("red circle (the one on the left)", 0.2),
        ("red (very) circle", 0.2),
        ("circle (unclosed", 0.2),
        ("(only parentheses)", 0.1),
    ],
)
def test_threshold_follows_equation_9(prompt, threshold):
    assert ShortcutRouter().threshold(prompt) == pytest.approx(threshold)


def test_threshold_with_larger_base_is_clipped():
    router = ShortcutRouter(base=0.6)
    assert router.threshold("circle") == pytest.approx(0.6)
    assert router.threshold("red circle") == 1.0


def test_modes():
    adaptive, sam_only, full_reasoning = (ShortcutRouter(mode) for mode in ROUTER_MODES)
    short, long = "circle", "the small object that is not like the others"
    assert adaptive.needs_first_pass(short) and not adaptive.needs_first_pass(long)
    assert adaptive.accepts(0.1, short) and not adaptive.accepts(0.0999, short)
    assert not adaptive.accepts(1.0, long)
    assert sam_only.threshold(long) == 0.0 and sam_only.accepts(0.0, long)
    assert not full_reasoning.needs_first_pass(short) and not full_reasoning.accepts(1.0, short)


def test_word_count_is_linear_for_adversarial_prompts():
    assert ShortcutRouter.word_count("(" * 200_000) == 1
    assert ShortcutRouter.word_count("(a " * 100_000) == 100_000


@pytest.mark.parametrize(
    ("arguments", "match"), [({"mode": "auto"}, "'auto'"), ({"base": 0}, "base is 0"), ({"base": 1.5}, "1.5")]
)
def test_rejects_invalid_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        ShortcutRouter(**arguments)


@pytest.mark.parametrize(
    ("prompt", "text", "threshold"),
    [
        ("circle", "circle", 0.1),
        ("red circle (the one on the left)", "red circle", 0.2),
        ("red (very) circle", "red circle", 0.2),
        ("(only parentheses)", "", 0.05),
        ("", "", 0.05),
        ("circle (unclosed", "circle (unclosed", 0.2),
        ("a (b (c) d) e", "a d) e", 0.4),  # a parenthesis ends at the first closing one
    ],
)
def test_parentheses_as_in_the_released_code(prompt, text, threshold):
    """They are removed from SAM's text, and a prompt that is completely in parentheses has no words: 0.1 * 2 ** -1."""
    router = ShortcutRouter(drop_parentheses=True, min_words=0)
    assert router.sam_text(prompt) == text
    assert router.threshold(prompt) == pytest.approx(threshold)
    assert ShortcutRouter().sam_text(prompt) == prompt


def test_repr_omits_default_settings():
    assert repr(ShortcutRouter()) == "ShortcutRouter(mode='adaptive', base=0.1)"
    assert repr(ShortcutRouter(min_words=0)) == "ShortcutRouter(mode='adaptive', base=0.1, min_words=0)"
    with pytest.raises(ValueError, match="min_words is 2; use 0 or 1"):
        ShortcutRouter(min_words=2)
