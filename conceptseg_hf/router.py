"""The shortcut router, which decides whether to accept the mask of SAM 3's first pass (eq. 9)."""

from __future__ import annotations

import re
from dataclasses import dataclass

ROUTER_MODES = ("adaptive", "sam_only", "full_reasoning")

_PARENTHESISED = re.compile(r"\([^()]*\)")
# Expression of the released code, which ends at the first ")" even for nested parentheses.
_UP_TO_PARENTHESIS = re.compile(r"\([^)]*\)")
_MAX_EXPONENT = 64  # avoids float overflow for very long prompts; the threshold is clipped to 1 anyway


@dataclass(frozen=True)
class ShortcutRouter:
    """Router that accepts SAM 3's mask if the presence of the prompt reaches a threshold that doubles with each word.

    The threshold of a prompt of l words is `clip(base * 2**(l - 1), 0, 1)` (eq. 9), so that long prompts require
    reasoning. Words in parentheses are not counted (as in the released code).

    Args:
        mode: `"adaptive"` applies eq. 9 and, beyond the paper, accepts no empty mask (without a concept);
            `"sam_only"` always accepts SAM 3's mask, and `"full_reasoning"` never accepts it.
        base: Threshold of a one-word prompt.
        drop_parentheses: Whether to remove text in parentheses from the prompt of SAM 3's first pass, as in the
            released code.
        min_words: Minimum word count of a prompt: 1, or 0 as in the released code, where a prompt that is completely in
            parentheses has l = 0 and half the threshold of one word.

    Raises:
        ValueError: If the mode is unknown, the base is not in (0, 1], or `min_words` is neither 0 nor 1.

    Example:
        >>> ShortcutRouter().threshold("red circle")
        0.2
    """

    mode: str = "adaptive"
    base: float = 0.1
    drop_parentheses: bool = False
    min_words: int = 1

    def __repr__(self) -> str:
        # The representation is saved with evaluation settings; default values are omitted.
        settings = {"mode": self.mode, "base": self.base}
        if self.drop_parentheses:
            settings["drop_parentheses"] = True
        if self.min_words != 1:
            settings["min_words"] = self.min_words
        return f"ShortcutRouter({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def __post_init__(self) -> None:
        if self.mode not in ROUTER_MODES:
            raise ValueError(
                f"ShortcutRouter: unknown mode {self.mode!r}; "
                f"use one of {', '.join(map(repr, ROUTER_MODES))}."
            )
        if not 0 < self.base <= 1:
            raise ValueError(f"ShortcutRouter: base is {self.base!r}; use a number above 0 and at most 1.")
        if self.min_words not in (0, 1):
            raise ValueError(f"ShortcutRouter: min_words is {self.min_words!r}; use 0 or 1.")

    @staticmethod
    def word_count(prompt: str) -> int:
        """Count the words outside parentheses."""
        return len(_PARENTHESISED.sub(" ", prompt).split())

    def sam_text(self, prompt: str) -> str:
        """Return the text of SAM 3's first pass for a prompt."""
        if not self.drop_parentheses:
            return prompt
        return " ".join(_UP_TO_PARENTHESIS.sub("", prompt).split())

    def threshold(self, prompt: str) -> float:
        """Return the minimum presence for the shortcut, in [0, 1]; 1 disables the shortcut."""
        if self.mode != "adaptive":
            return 0.0 if self.mode == "sam_only" else 1.0
        words = len(self.sam_text(prompt).split()) if self.drop_parentheses else self.word_count(prompt)
        exponent = min(max(words, self.min_words) - 1, _MAX_EXPONENT)
        return min(self.base * 2**exponent, 1.0)

    def needs_first_pass(self, prompt: str) -> bool:
        """Whether the shortcut is possible for a prompt, so that SAM 3's first pass is required."""
        return self.threshold(prompt) < 1.0

    def accepts(self, presence: float, prompt: str) -> bool:
        """Whether to accept SAM 3's mask, given its presence of the prompt in [0, 1]."""
        return self.needs_first_pass(prompt) and presence >= self.threshold(prompt)
