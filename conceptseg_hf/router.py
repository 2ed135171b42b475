"""The shortcut router: may SAM 3's first look at the user's words be the answer (eq. 9)?"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROUTER_MODES = ("adaptive", "sam_only", "full_reasoning")

_PARENTHESISED = re.compile(r"\([^()]*\)")
_UP_TO_PARENTHESIS = re.compile(
    r"\([^)]*\)"
)  # the released code's: inside of others it ends at the first ")"
_MAX_EXPONENT = 64  # 2**64 reaches every clip; keeps absurdly long prompts within float range


@dataclass(frozen=True)
class ShortcutRouter:
    """Accepts SAM 3's mask when the presence of the prompt reaches a threshold that doubles with every word.

    The threshold of a prompt of l words is `clip(base * 2**(l - 1), 0, 1)` (eq. 9): long prompts are reasoned
    about, short ones must only be seen. Text in parentheses is not counted (as in the released code).

    Args:
        mode: `"adaptive"` follows eq. 9; `"sam_only"` always takes SAM 3's mask; `"full_reasoning"` never
            does.
        base: Threshold of a one-word prompt.
        drop_parentheses: Whether SAM 3's first look reads the prompt without its text in parentheses, as in the
            released code.
        min_words: As how many words a prompt counts at least: 1, or 0 as in the released code, where one that is all
            in parentheses has l = 0 and half the threshold of one word.

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
        # Evaluations keep it among their settings: what is as usual is not said.
        shown = {"mode": self.mode, "base": self.base}
        if self.drop_parentheses:
            shown["drop_parentheses"] = True
        if self.min_words != 1:
            shown["min_words"] = self.min_words
        return f"ShortcutRouter({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __post_init__(self) -> None:
        if self.mode not in ROUTER_MODES:
            raise ValueError(
                f"ShortcutRouter: no mode is named {self.mode!r}; "
                f"use one of {', '.join(map(repr, ROUTER_MODES))}."
            )
        if not 0 < self.base <= 1:
            raise ValueError(f"ShortcutRouter: base is {self.base!r}; use a number above 0 and at most 1.")
        if self.min_words not in (0, 1):
            raise ValueError(f"ShortcutRouter: min_words is {self.min_words!r}; use 0 or 1.")

    @staticmethod
    def word_count(prompt: str) -> int:
        """Number of words outside parentheses."""
        return len(_PARENTHESISED.sub(" ", prompt).split())

    def sam_text(self, prompt: str) -> str:
        """What SAM 3's first look reads of a prompt."""
        if not self.drop_parentheses:
            return prompt
        return " ".join(_UP_TO_PARENTHESIS.sub("", prompt).split())

    def threshold(self, prompt: str) -> float:
        """Presence, in [0, 1], from which on the shortcut is taken (1 stands for "never")."""
        if self.mode != "adaptive":
            return 0.0 if self.mode == "sam_only" else 1.0
        words = len(self.sam_text(prompt).split()) if self.drop_parentheses else self.word_count(prompt)
        exponent = min(max(words, self.min_words) - 1, _MAX_EXPONENT)
        return min(self.base * 2**exponent, 1.0)

    def needs_first_pass(self, prompt: str) -> bool:
        """Whether SAM 3's first look can decide at all; if not, it need not be taken."""
        return self.threshold(prompt) < 1.0

    def accepts(self, presence: float, prompt: str) -> bool:
        """Whether SAM 3's mask is the answer, given the presence (0-1) that SAM 3 assigns to the prompt."""
        return self.needs_first_pass(prompt) and presence >= self.threshold(prompt)
