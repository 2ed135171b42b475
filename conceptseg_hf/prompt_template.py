"""The instruction the MLLM gets, as data: saved in processor_config.json, where it can be replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

_PLACEHOLDER = re.compile(r"\{(problem|reference_boxes)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """The texts around a prompt, one for each way references can be given.

    `{problem}` stands for the user's words and `{reference_boxes}` for the boxes of the support references,
    in text units of the mosaic.

    Attributes:
        system: The system message.
        with_proxy: References, one of which is the proxy query: asks for `<check>`.
        support_only: Several references with at least one box, no proxy query.
        single_reference: One reference, or several without any box: no list of boxes.
        no_reference: The target image alone.
    """

    system: str
    with_proxy: str
    support_only: str
    single_reference: str
    no_reference: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ValueError(f"PromptTemplate: {field.name} is a {type(value).__name__}; give a string.")
            if field.name != "system" and "{problem}" not in value:
                raise ValueError(
                    f"PromptTemplate: {field.name} lacks {{problem}}; say where the user's words go."
                )

    def fill(self, variant: str, problem: str, reference_boxes: str = "") -> str:
        """The instruction of one prompt.

        Args:
            variant: `"with_proxy"`, `"support_only"`, `"single_reference"` or `"no_reference"`.
            problem: The user's words, inserted as they are.
            reference_boxes: The support boxes as text.
        """
        values = {"problem": problem, "reference_boxes": reference_boxes}
        # One pass, so that a placeholder inside the user's words stays what it is.
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], getattr(self, variant))

    def to_dict(self) -> dict[str, str]:
        """The template as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> PromptTemplate:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If a text is missing or a field is unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ValueError(f"prompt_template has the fields {sorted(data)}; give exactly {sorted(names)}.")
        return cls(**data)


_TASK = 'Your task is to locate the object matching "{problem}" in the target image.\n'
_TARGET = "Target image: the image for grounding.\n"
_FORMAT = "Output strictly in the following format: <think>[Your step-by-step analysis and reasoning]</think>"
_RULE = "<rule>Visual rule of the reference targets</rule>"
_CHECK = "<check>[x1, y1, x2, y2]</check>"
_RESULT = (
    "<bbox>[x3, y3, x4, y4]</bbox><answer>concise noun phrase of 1 to 3 words for the target object</answer>"
)
_THINK = "Think through the reasoning process in your mind, induce the visual rule"
_APPLY = "apply this rule to locate the corresponding object in the target image.\n"
_INDUCE = f"{_THINK} of the reference targets, and {_APPLY}"

OFFICIAL_TEMPLATE = PromptTemplate(
    system="You are a helpful assistant.",
    with_proxy=(
        f"{_TASK}Reference image: bounding boxes provided at {{reference_boxes}}.\n{_TARGET}"
        f"{_THINK} and check it by locating the missed bounding box in the top-left region of the "
        f"reference image, {_APPLY}"
        f"{_FORMAT}{_RULE}{_CHECK}{_RESULT}"
    ),
    support_only=(
        f"{_TASK}Reference image: bounding boxes provided at {{reference_boxes}}.\n{_TARGET}"
        f"{_INDUCE}{_FORMAT}{_RULE}{_RESULT}"
    ),
    single_reference=(
        f"{_TASK}Reference image: the image to induce the rule from.\n{_TARGET}"
        f"{_INDUCE}{_FORMAT}{_RULE}{_RESULT}"
    ),
    no_reference=f"{_TASK}{_TARGET}{_THINK}, and {_APPLY}{_FORMAT}<rule>Visual rule</rule>{_RESULT}",
)
"""The protocol of the paper (appendix D.1): task, reference boxes, rule and its check, output format."""
