"""What the CTM reads in stage I: true completions, templated ones, or the frozen MLLM's own, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, format_completion
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation.loading import fingerprint
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.images import load_image
from conceptseg_hf.processing_conceptseg import Frame
from conceptseg_hf.references import resolve_references

from .samples import ReadableSamples

_GENERIC_ANSWERS = ("visual", "object")


@dataclass(frozen=True)
class TrainingCompletion:
    """A completion for teacher forcing.

    Attributes:
        text: The text, or the token ids without the end-of-turn token.
        sam_text: What SAM 3 gets as the answer.
        rule: The rule in it, for example pictures.
    """

    text: str | list[int]
    sam_text: str
    rule: str | None = None


def ground_truth_completion(
    sample: ConceptSample, frame: Frame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """The sample's reasoning, rule, boxes and answer.

    Raises:
        ValueError: If the sample lacks one of them.
    """
    missing = [name for name in ("think", "rule", "answer") if getattr(sample, name) is None]
    if missing:
        raise ValueError(
            f"sample {sample.sample_id!r} has no true {' and '.join(missing)}; use completion_source template, "
            "released or generated."
        )
    text = _write(sample, frame, processor, sample.think, sample.rule, sample.answer)
    return TrainingCompletion(text, sample.answer, sample.rule)


def template_completion(
    sample: ConceptSample, frame: Frame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """The sample's boxes and its answer (else its prompt), with empty reasoning and rule."""
    answer = sample.answer or sample.prompt
    return TrainingCompletion(_write(sample, frame, processor, "", "", answer), answer)


def released_completion(
    sample: ConceptSample, frame: Frame, processor: ConceptSegProcessor, draw: int
) -> TrainingCompletion:
    """Boxes and nothing else; SAM 3 gets "visual" or "object" by the parity of the random number `draw`."""
    return TrainingCompletion(_write(sample, frame, processor, "", "", ""), _GENERIC_ANSWERS[draw % 2])


def _write(
    sample: ConceptSample, frame: Frame, processor: ConceptSegProcessor, think: str, rule: str, answer: str
) -> str:
    box = None if sample.box is None else processor.box_to_text(sample.box, frame)
    return format_completion(
        think, rule, processor.check_to_text(frame), box, answer, processor.coordinate_scale
    )


class CompletionCache:
    """Completions of one frozen MLLM in a folder, a JSON line each: generated once, whoever asks how often.

    Every process writes a file of its own and reads all of them, so a run that was killed goes on where it
    was, with any number of processes. A line belongs to what the MLLM read (prompt, picture, references), whatever
    the name of the sample, so that data sets may share a folder. Lines of another MLLM, template, canvas or length
    limit are passed over.

    Args:
        folder: Created if missing.
        model: Its MLLM is the one that writes.
        processor: Writes the prompts.
        max_new_tokens: Limit of a completion.
    """

    def __init__(
        self,
        folder: Path,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        max_new_tokens: int,
    ) -> None:
        self.folder = folder
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.policy = _policy(model, processor, max_new_tokens)
        self._token_ids: dict[str, list[int]] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._token_ids)

    def __contains__(self, sample: ConceptSample) -> bool:
        return _digest(sample) in self._token_ids

    def reload(self) -> None:
        """Reads what all processes have written so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            self._token_ids.update(
                (row["inputs"], row["token_ids"])
                for row in _rows(path)
                # early versions went by the sample's name alone
                if row["policy"] == self.policy and "inputs" in row
            )

    def completion(self, sample: ConceptSample) -> TrainingCompletion:
        """The completion of a sample that `generate` has seen; SAM 3 gets its answer, else the prompt."""
        token_ids = self._token_ids[_digest(sample)]
        parsed = self.processor.decode_completion(token_ids)
        return TrainingCompletion(token_ids, parsed.answer or sample.prompt, parsed.rule)

    def generate(
        self,
        model: ConceptSegForSegmentation,
        samples: Sequence[ConceptSample],
        batch_size: int = 16,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Lets the MLLM complete, greedily, those of every `processes`-th sample that are missing.

        Args:
            model: The one that the cache was made for.
            samples: References as they are (not composed at random).
            batch_size: Prompts at a time.
            process: Number of this process, from 0.
            processes: How many processes share the work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"completions-{process:05d}.jsonl"
        _drop_torn_line(path)
        if not isinstance(samples, ReadableSamples):
            samples = ReadableSamples(samples)
        batch: dict[str, ConceptSample] = {}
        mine = range(process, len(samples), processes)
        progress = tqdm(mine, desc="completions", unit="sample", disable=process > 0, mininterval=5)
        with path.open("a", encoding="utf-8") as file:
            for index in progress:
                sample = samples[index]
                if index in samples.stand_ins:
                    continue  # what stands in has its own turn
                digest = _digest(sample)
                if digest not in self._token_ids:
                    batch[digest] = sample
                if len(batch) == batch_size:
                    self._write(self._complete(model, batch), file)
                    batch = {}
            if batch:
                self._write(self._complete(model, batch), file)

    def _write(self, rows: Iterator[dict], file: TextIO) -> None:
        for row in rows:
            self._token_ids[row["inputs"]] = row["token_ids"]
            file.write(json.dumps(row) + "\n")
        file.flush()

    def _complete(
        self, model: ConceptSegForSegmentation, samples: dict[str, ConceptSample]
    ) -> Iterator[dict]:
        prepared = [
            self.processor.prepare(sample.image, sample.prompt, sample.references, lazy=True)
            for sample in samples.values()
        ]
        generated = generate_with_states(
            model.vlm,
            self.processor.collate(prepared, device=model.device),
            {"max_new_tokens": self.max_new_tokens},
            model.config.hidden_states_at,
        )
        for (digest, sample), token_ids, mask in zip(
            samples.items(), generated.token_ids, generated.mask, strict=True
        ):
            ids = token_ids[mask].tolist()
            yield {
                # for people who read the file
                "sample": "/".join((sample.dataset, sample.split, sample.sample_id)),
                "text": self.processor.tokenizer.decode(ids),
                "inputs": digest,
                "policy": self.policy,
                "token_ids": ids,
            }


def _digest(sample: ConceptSample) -> str:
    """A hash of all that the MLLM reads of a sample: the words, the picture, the references as they are shown."""
    references = resolve_references(sample.references)
    # default: numbers may be NumPy's
    words = json.dumps([sample.prompt, references.boxes, references.proxy], default=float)
    digest = hashlib.sha256(words.encode())
    for image in (load_image(sample.image), *references.images):
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _policy(model: ConceptSegForSegmentation, processor: ConceptSegProcessor, max_new_tokens: int) -> str:
    """A hash of everything but the sample that decides what the MLLM writes."""
    settings = {
        "weights": fingerprint(model.vlm)["weights"],
        "prompt_template": processor.prompt_template,
        "canvas_size": processor.canvas_size,
        "coordinate_scale": processor.coordinate_scale,
        "max_new_tokens": max_new_tokens,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _rows(path: Path) -> Iterator[dict]:
    """The complete lines of a file; the last one may have been cut off when a run was killed."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _drop_torn_line(path: Path) -> None:
    """Cuts the file behind its last complete line, so that the next line does not begin in a torn one."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
