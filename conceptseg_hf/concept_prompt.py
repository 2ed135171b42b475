"""An induced concept as an object and a file: what SAM 3 is prompted with, and how well it explains the references."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .errors import first_line
from .hashing import weights_hash
from .writing import json_text, write_file

if TYPE_CHECKING:
    from .modeling_conceptseg import ConceptSegForSegmentation

FORMAT, VERSION = "conceptseg-concept", 1
RELIABLE_SCORE = 0.5
"""Score from which the adaptive router applies a concept without reasoning, if the score of reasoning is unknown."""

LOWEST_SCORE, TOLERANCE = 0.3, 0.05
"""Otherwise: at least this score, and at most this much below the score of reasoning on the same references."""

CAUTION = 0.5
"""Means over references are reduced by this many standard errors, since few references can agree by coincidence."""

MISSED_IOU, MISSED_SHARE = 0.2, 0.25
"""Concept and rule may miss, with an IoU below the first value, only less than this share of the references."""

RULE_GAIN = 0.1
"""The router applies a rule whose score is this much above that of reasoning, as it is the best of several rules."""

NUM_EXAMPLES = 4
"""Number of references that the VLM is shown: those of a mosaic of 2 x 2 images."""

_MAX_HEADER = 1_000_000  # bytes; a concept's header contains a few kilobytes of text
_MAX_FILE = 16_000_000  # bytes; a concept has at most a few tokens
_MAX_TEXT = 10_000  # characters of a prompt, phrase or rule
_TENSOR = "concept_embeds"


@dataclass(frozen=True)
class CandidateScore:
    """How well a candidate prompt explains the references.

    Attributes:
        name: The phrase, or the name of the candidate if it is not a phrase.
        score: Mean IoU over the references.
        per_reference: IoU on each reference.
    """

    name: str
    score: float
    per_reference: tuple[float, ...]


@dataclass(frozen=True)
class ConceptPrompt:
    """A concept that was induced from references and is applied to other images by SAM 3 alone.

    Attributes:
        prompt: The user's prompt.
        phrases: Phrases for SAM 3; with several phrases, each image uses the one with the highest presence.
        rule: The rule that explains the references best if the VLM is given it, or None.
        concept_embeds: (L, D) tokens in SAM 3's prompt space that precede the phrase, or None.
        threshold: Minimum presence for accepting the mask without reasoning, in [0, 1].
        score: Mean IoU on the references; None if the concept was edited and not verified since.
        scores: Scores of all candidates, best first.
        model_hash: Hash of the weights of SAM 3 and the CTM that the concept was made with; see `concept_hash`.
        reasoning_score: Mean IoU of full reasoning on the references, each with the others as examples, or None.
        reasoning_ious: IoU of full reasoning on each reference; empty if it is unknown.
        rule_score: Mean IoU on the references if the VLM is given the rule; None if the rule is not verified.
        rule_ious: IoU on each reference if the VLM is given the rule; empty if it is unknown.
    """

    prompt: str
    phrases: tuple[str, ...]
    rule: str | None = None
    concept_embeds: torch.Tensor | None = None
    threshold: float = 0.1
    score: float | None = None
    scores: tuple[CandidateScore, ...] = ()
    model_hash: str = ""
    reasoning_score: float | None = None
    reasoning_ious: tuple[float, ...] = ()
    rule_score: float | None = None
    rule_ious: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if fault := _find_fault(self):
            raise ValueError(f"ConceptPrompt: {fault}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConceptPrompt) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    @property
    def reference_ious(self) -> tuple[float, ...]:
        """IoU of the selected candidate on each reference; empty without scores."""
        return self.scores[0].per_reference if self.scores else ()

    @property
    def is_reliable(self) -> bool:
        """Whether the concept explains the references as well as reasoning; otherwise the adaptive router reasons."""
        cautious = self.cautious_score
        if self.score is None or cautious is None or cautious < self.required_score:
            return False
        ious = self.reference_ious
        if _num_missed(ious):
            return False
        if not ious or len(ious) != len(self.reasoning_ious):
            return True
        return _cautious_mean([a - b for a, b in zip(ious, self.reasoning_ious)]) >= -TOLERANCE

    @property
    def cautious_score(self) -> float | None:
        """The score, or if it is lower, the mean IoU minus `CAUTION` standard errors; the router relies on it."""
        ious = self.reference_ious
        if self.score is None or self.reasoning_score is None or not ious:
            return self.score
        return min(self.score, _cautious_mean(ious))

    @property
    def rule_is_reliable(self) -> bool:
        """Whether the adaptive router gives the rule to the VLM when SAM 3 alone is not accepted."""
        if self.rule is None or self.rule_score is None or _num_missed(self.rule_ious):
            return False
        return self.rule_score >= (self.reasoning_score or 0.0) + RULE_GAIN

    @property
    def required_score(self) -> float:
        """Minimum of `cautious_score`."""
        if self.reasoning_score is None:
            return RELIABLE_SCORE
        return max(LOWEST_SCORE, self.reasoning_score - TOLERANCE)

    @property
    def worst_reference(self) -> int | None:
        """Index of the reference that the selected candidate explains worst; None without scores."""
        ious = self.reference_ious
        return min(range(len(ious)), key=ious.__getitem__) if ious else None

    def useful_references(self, count: int = NUM_EXAMPLES) -> tuple[int, ...]:
        """Return the indices of the references that the concept explains best, to be shown to the VLM as examples.

        Ambiguous or wrongly marked references misguide the reasoning (paper, appendix L).

        Args:
            count: Maximum number of references; the paper shows four.
        """
        return best_indices(self.reference_ious, count)

    def summary(self, reference_names: Sequence[str] | None = None) -> str:
        """Return one to three sentences: how well the concept is verified, and the most useful of many references.

        Args:
            reference_names: Names of the references; their indices by default.
        """
        names = " or ".join(map(repr, self.phrases))
        if self.score is None:
            return f"{names} has not been verified; call `verify` with references."
        text = f"{names} explains the references with a mean IoU of {self.score:.2f}."
        ious = self.reference_ious
        all_names = [*map(str, range(len(ious)))] if reference_names is None else reference_names
        useful = ""
        if len(ious) > NUM_EXAMPLES:
            *first, last = (all_names[i] for i in self.useful_references())
            useful = f" To reason with, references {', '.join(first)} and {last} are the most useful."
        if self.is_reliable or self.worst_reference is None:
            return text + useful
        worst, name = ious[self.worst_reference], all_names[self.worst_reference]
        if missed := _num_missed(ious):
            fault = f"It misses {missed} of {len(ious)} references"
        else:
            fault = (
                f"This is not reliably as good as reasoning ({self.required_score:.2f} required, with caution "
                f"{self.cautious_score:.2f})"
            )
        return (
            f"{text} {fault}, so the adaptive router uses "
            f"{'the rule' if self.rule_is_reliable else 'full reasoning'}; reference {name} fits worst "
            f"({worst:.2f}).{useful}"
        )

    def with_phrase(self, *phrases: str) -> ConceptPrompt:
        """Return a copy with other phrases and without tokens, which has to be verified again (`induction.verify`)."""
        return replace(self, phrases=phrases, concept_embeds=None, score=None, scores=())

    def with_rule(self, rule: str | None) -> ConceptPrompt:
        """Return a copy with another rule, which has to be verified again; phrases and scores do not depend on it."""
        return replace(self, rule=rule, rule_score=None, rule_ious=())

    def check_model(self, model: ConceptSegForSegmentation) -> None:
        """Raise a ValueError if the concept was made with other weights, or its tokens do not fit the model."""
        width = model.config.ctm_config.sam_hidden_size
        if self.concept_embeds is not None and self.concept_embeds.shape[-1] != width:
            raise ValueError(
                f"ConceptPrompt: the concept {self.prompt!r} has tokens of width {self.concept_embeds.shape[-1]}, but "
                f"SAM 3 of this model has width {width}; induce it again with this model."
            )
        self.check_hash(concept_hash(model))

    def check_hash(self, found: str) -> None:
        """Raise a ValueError if `found`, the `concept_hash` of a model, shows that it has other weights."""
        if self.model_hash and self.model_hash != found:
            raise ValueError(
                f"ConceptPrompt: the concept {self.prompt!r} was made with other weights of SAM 3 or the CTM (hash "
                f"{self.model_hash}, this model has {found}); induce it again with this model."
            )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the concept as a safetensors file with its text in the header.

        Args:
            path: The file; an existing file is replaced.

        Raises:
            OSError: If the file cannot be written.
        """
        path = Path(path)
        write_file(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """Return the content of a file of `save`; equal concepts have equal contents."""
        values = asdict(replace(self, concept_embeds=None))
        metadata = {"format": FORMAT, "version": str(VERSION), "concept": json_text(values)}
        tensors = (
            {} if self.concept_embeds is None else {_TENSOR: self.concept_embeds.detach().cpu().contiguous()}
        )
        return _with_sorted_header(save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> ConceptPrompt:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a valid concept.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"concept {str(path)!r} is not a file; give a file of `conceptseg induce`."
            )
        if (size := path.stat().st_size) > _MAX_FILE:
            raise ValueError(
                f"{str(path)!r} has {size / 1e6:.0f} MB, too much for a concept; give a file of `conceptseg induce`."
            )
        return cls.from_bytes(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, content: bytes, name: str = "concept") -> ConceptPrompt:
        """Return the concept with a file content of `to_bytes`; `name` is the file's name in messages.

        Raises:
            ValueError: If the content is not a valid concept.
        """
        metadata, tensor = _read(content, name)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{name!r} is not a concept; give a file of `conceptseg induce`.")
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"concept {name!r} has version {metadata.get('version')!r}, but this package reads version "
                f"{VERSION}; induce it again, or use another version of the package."
            )
        try:
            values = json.loads(metadata["concept"])
            if not isinstance(values["phrases"], list):
                raise TypeError("phrases is not a list")
            scores = tuple(
                CandidateScore(str(row["name"]), float(row["score"]), tuple(map(float, row["per_reference"])))
                for row in values["scores"]
            )
            return cls(
                prompt=values["prompt"],
                phrases=tuple(values["phrases"]),
                rule=values["rule"],
                concept_embeds=tensor,
                threshold=float(values["threshold"]),
                score=_number(values["score"]),
                scores=scores,
                model_hash=_text(values["model_hash"]),
                reasoning_score=_number(values.get("reasoning_score")),
                reasoning_ious=tuple(map(float, values.get("reasoning_ious", ()))),
                rule_score=_number(values.get("rule_score")),
                rule_ious=tuple(map(float, values.get("rule_ious", ()))),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
            raise ValueError(f"concept {name!r} is damaged ({reason}); induce it again.") from error


def best_indices(values: Sequence[float], count: int = NUM_EXAMPLES) -> tuple[int, ...]:
    """Return the indices of the highest values in ascending order."""
    return tuple(sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count]))


def as_concept(concept: ConceptPrompt | str | os.PathLike) -> ConceptPrompt:
    """Return a concept given as an object or as the path of a file."""
    return concept if isinstance(concept, ConceptPrompt) else ConceptPrompt.load(concept)


def concept_hash(model: ConceptSegForSegmentation, stored: Mapping[str, torch.Tensor] | None = None) -> str:
    """Return a hash of the weights that a concept depends on: those of SAM 3 and the CTM; see `weights_hash`.

    Raises:
        ValueError: If the model has no CTM.
    """
    if not hasattr(model, "ctm"):
        raise ValueError(f"a {type(model).__name__} applies no concepts; use a ConceptSeg checkpoint.")
    return weights_hash({"sam": model.sam, "ctm": model.ctm}, stored)


def _find_fault(concept: ConceptPrompt) -> str | None:
    texts: Mapping[str, Any] = {"prompt": concept.prompt, "rule": concept.rule}
    texts = {**texts, **{f"phrase {number}": phrase for number, phrase in enumerate(concept.phrases)}}
    for name, text in texts.items():
        if name == "rule" and text is None:
            continue
        if not isinstance(text, str) or (not text.strip() and name != "rule"):
            return f"{name} is {text!r}; give a text."
        if len(text) > _MAX_TEXT:
            return f"{name} has {len(text)} characters; use at most {_MAX_TEXT}."
    if not concept.phrases and concept.concept_embeds is None:
        return "there are neither phrases nor concept tokens; give at least one of them."
    numbers: tuple[tuple[str, float | None], ...] = (
        ("threshold", concept.threshold),
        ("score", concept.score),
    )
    numbers += (("reasoning_score", concept.reasoning_score), ("rule_score", concept.rule_score))
    numbers += tuple(("reasoning_ious", value) for value in concept.reasoning_ious)
    for name, value in (*numbers, *(("rule_ious", value) for value in concept.rule_ious)):
        if value is not None and not 0 <= value <= 1:
            return f"{name} is {value}; use a number between 0 and 1."
    for row in concept.scores:
        if not all(0 <= value <= 1 for value in (row.score, *row.per_reference)):
            return f"the scores of {row.name!r} are not between 0 and 1."
    tokens = concept.concept_embeds
    if tokens is None:
        return None
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"concept_embeds has dtype {tokens.dtype}; give float32."
    if tokens.ndim != 2 or not tokens.numel() or not tokens.isfinite().all():
        return f"concept_embeds has shape {tuple(tokens.shape)} or is not finite; give finite numbers of shape (L, D)."
    return None


def _cautious_mean(values: Sequence[float]) -> float:
    """Return the mean of one or more values minus `CAUTION` standard errors."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean - CAUTION * math.sqrt(variance / len(values))


def _num_missed(ious: Sequence[float]) -> int:
    """Return how many references are missed, or 0 if these are few enough for a concept.

    What all references have in common does not miss one of them, however well it fits the others.
    """
    missed = sum(iou < MISSED_IOU for iou in ious)
    return missed if ious and missed >= MISSED_SHARE * len(ious) else 0


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _read(content: bytes, name: str) -> tuple[dict[str, str], torch.Tensor | None]:
    """Return the metadata and the tensor of the content of a safetensors file."""
    length = _header_length(content)
    if not 0 < length <= min(_MAX_HEADER, len(content)):
        raise ValueError(f"{name!r} is not a concept; give a file of `conceptseg induce`.")
    try:
        tensors = load(content)  # also validates the header
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name!r} is damaged or not a concept ({first_line(error)}).") from error
    if set(tensors) - {_TENSOR}:
        raise ValueError(f"{name!r} has other tensors than a concept; give a file of `conceptseg induce`.")
    return metadata, tensors.get(_TENSOR)


def _with_sorted_header(content: bytes) -> bytes:
    """Sort the entries of a safetensors header, whose order is random otherwise."""
    end = 8 + _header_length(content)
    header = json_text(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors are aligned
    return struct.pack("<Q", len(header)) + header + content[end:]


def _header_length(content: bytes) -> int:
    return struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
