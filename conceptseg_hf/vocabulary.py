"""Words of a prompt that are not in the vocabulary of a tokenizer.

The byte-level tokenizers of Qwen and SAM 3 can represent every word. The embedded checkpoints have a few hundred words,
and read all others as one unknown token.
"""

from __future__ import annotations

import re
from typing import Any


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Return the words of a text that a tokenizer does not know, in their order and each once.

    A word is text between spaces, without punctuation at its ends.

    Args:
        tokenizer: A fast tokenizer; for others the result is empty.
        text: The text.
    """
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    unknown = [
        span
        for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id
    ]
    words = [
        match[0]
        for match in re.finditer(r"\w(?:\S*\w)?", text)
        if any(start < match.end() and match.start() < end for start, end in unknown)
    ]
    return list(dict.fromkeys(words))
