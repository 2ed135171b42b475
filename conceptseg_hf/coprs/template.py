"""The instruction of CoPRS: reason, then end with the concentration token (section 3.1)."""

from __future__ import annotations

from ..prompt_template import PromptTemplate
from .completion import REF_POS

_QUESTION = 'Find the region of the target image that answers: "{problem}".\n'
_FORMAT = (
    "First reason about the image and the request step by step in <think> </think>, then output the token "
    f"{REF_POS}, which locates the region. Output format: <think>your reasoning</think>{REF_POS}"
)
_BOXES = (
    "The first image shows references, with boxes at {reference_boxes}; the last one is the target image.\n"
)
_REFERENCE = "The first image shows references; the last one is the target image.\n"

COPRS_TEMPLATE = PromptTemplate(
    system="You are a helpful assistant.",
    with_proxy=f"{_BOXES}{_QUESTION}{_FORMAT}",
    support_only=f"{_BOXES}{_QUESTION}{_FORMAT}",
    single_reference=f"{_REFERENCE}{_QUESTION}{_FORMAT}",
    no_reference=f"{_QUESTION}{_FORMAT}",
)
