"""What the CTM reads in stage I: true completions, templated ones, or the frozen VLM's own, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, format_completion
from conceptseg_hf.completion import find_markup, find_template_tag, format_box_list
from conceptseg_hf.data import ConceptSample, UnreadableSampleError
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.images import load_image
from conceptseg_hf.loading import fingerprint
from conceptseg_hf.processing_conceptseg import CoordinateFrame
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.references import resolve_references
from conceptseg_hf.writing import json_text, write_error

from .samples import ReadableSamples, spread_indices
from .sft_config import ConceptSFTConfig

logger = logging.getLogger(__name__)

_TRUE_TEXTS = ("think", "rule", "answer")
# The released code's stage I: one space in each tag but that of the box, no rule and no check.
_RELEASED_FORM = " <think> </think> <color> </color><bbox>{box}</bbox> <answer> </answer>"
_RELEASED_WORD = "visual"


@dataclass(frozen=True)
class TrainingCompletion:
    """A completion for teacher forcing.

    Attributes:
        text: The text, or the token ids without the end-of-turn token.
        sam_text: What SAM 3 gets as the answer.
        rule: The rule in it, for example pictures.
        is_truncated: Whether it was generated and ended by its limit, without an end-of-turn token.
    """

    text: str | list[int]
    sam_text: str
    rule: str | None = None
    is_truncated: bool = False


def ground_truth_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """The sample's reasoning, rule, boxes and answer; where it lacks one of them, what `template_completion` makes."""
    texts = _gt_texts(sample)
    if texts is None:
        return template_completion(sample, frame, processor)
    _, rule, answer = texts
    return TrainingCompletion(_write(sample, frame, processor, *texts), answer, rule)


def has_reasoning(sample: ConceptSample) -> bool:
    """Whether a sample has true reasoning, rule and answer."""
    return _gt_texts(sample) is not None


def _gt_texts(sample: ConceptSample) -> tuple[str, str, str] | None:
    """Reasoning, rule and answer of a sample that has all of them."""
    think, rule, answer = sample.think, sample.rule, sample.answer
    return None if think is None or rule is None or answer is None else (think, rule, answer)


def check_sample_texts(sample: ConceptSample, processor: ConceptSegProcessor, source: str) -> None:
    """Checks the words of a sample before they are trained on, as inference checks a prompt.

    Args:
        sample: The sample.
        processor: Knows the reserved tokens.
        source: See `ConceptSFTConfig.completion_source`; says which words stand in completions.

    Raises:
        ValueError: If the prompt cannot be used, or a text of the completion holds a reserved token or a tag.
    """
    processor.check_prompt(sample.prompt)
    written: dict[str, str] = {}
    if source == "ground_truth" and has_reasoning(sample):
        written = {name: getattr(sample, name) for name in _TRUE_TEXTS}
    elif source in ("ground_truth", "template"):
        written = {"prompt": sample.prompt} if sample.answer is None else {"answer": sample.answer}
    for name, text in written.items():
        processor.check_text(text, name)
        tag = find_markup(text) if name == "answer" else find_template_tag(text)
        if tag is not None:
            raise ValueError(
                f"{name} contains the tag {tag}, which has a meaning in completions; leave it out."
            )


def resolve_completion_source(
    samples: Sequence[ConceptSample], args: ConceptSFTConfig, list_some: bool = True
) -> None:
    """Goes over to templated completions where samples have no reasoning, rule and answer of their own, and says so.

    Some samples are tried. A sample without them gets a templated completion in any case.

    Args:
        samples: The samples to train on.
        args: `completion_source` may change from `"ground_truth"` to `"template"`.
        list_some: Whether to speak of it, too, if only some lack them.
    """
    if args.completion_source != "ground_truth":
        return
    tried = list(_try_samples(samples))
    lacking = [sample for sample in tried if not has_reasoning(sample)]
    made = "completions are made from their boxes and their answers, else prompts"
    if lacking and len(lacking) == len(tried):
        args.completion_source = "template"
        logger.warning("the samples have no think, rule and answer: %s (completion_source template).", made)
    elif lacking and list_some:
        logger.warning(
            "%d of %d samples that were tried, such as %r, have no think, rule and answer: %s.",
            len(lacking),
            len(tried),
            lacking[0].sample_id,
            made,
        )


def _try_samples(samples: Sequence[ConceptSample]) -> Iterator[ConceptSample]:
    for index in spread_indices(len(samples)):
        with suppress(UnreadableSampleError):
            if isinstance(sample := samples[index], ConceptSample):
                yield sample


def template_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """The sample's boxes and its answer (else its prompt), with empty reasoning and rule."""
    answer = sample.answer or sample.prompt
    return TrainingCompletion(_write(sample, frame, processor, "", "", answer), answer)


def released_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """The target's box between blank tags, as a list of Python; SAM 3 gets the word "visual"."""
    box = (0.0, 0.0, 0.0, 0.0) if sample.box is None else frame.image_box_to_text(sample.box)
    written = format_box_list([box], processor.coordinate_scale)[1:-1]
    return TrainingCompletion(_RELEASED_FORM.format(box=written), _RELEASED_WORD)


def _write(
    sample: ConceptSample,
    frame: CoordinateFrame,
    processor: ConceptSegProcessor,
    think: str,
    rule: str,
    answer: str,
) -> str:
    box = None if sample.box is None else frame.image_box_to_text(sample.box)
    return format_completion(think, rule, frame.check_box, box, answer, processor.coordinate_scale)


class CompletionCache:
    """Completions of one frozen VLM in a folder, a JSON line each: generated once, whoever asks how often.

    Every process writes a file of its own and reads all of them, so a run that was killed goes on where it
    was, with any number of processes. A line belongs to what the VLM read (prompt, picture, references), whatever
    the name of the sample, so that data sets may share a folder. Lines of another VLM, template, canvas or length
    limit are passed over.

    Args:
        folder: Created if missing.
        model: Its VLM is the one that writes.
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
        self._config = model.config
        self._token_ids: dict[str, list[int]] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._token_ids)

    def __contains__(self, sample: ConceptSample) -> bool:
        return _digest(sample, self.processor) in self._token_ids

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
        """The completion of a sample that `generate` has seen; SAM 3 gets what it would in inference."""
        token_ids = self._token_ids[_digest(sample, self.processor)]
        parsed = self.processor.decode_completion(token_ids)
        return TrainingCompletion(
            token_ids,
            self._config.sam_text_prompt(parsed.answer, sample.prompt),
            parsed.rule,
            is_truncated=len(token_ids) >= self.max_new_tokens,
        )

    def generate(
        self,
        model: ConceptSegForSegmentation,
        samples: Sequence[ConceptSample],
        batch_size: int = 16,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Lets the VLM complete, greedily, those of every `processes`-th sample that are missing.

        Args:
            model: The one that the cache was made for.
            samples: References as they are (not composed at random).
            batch_size: Prompts at a time.
            process: Number of this process, from 0.
            processes: How many processes share the work.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        path = self.folder / f"completions-{process:05d}.jsonl"
        _drop_torn_line(path)
        if not isinstance(samples, ReadableSamples):
            samples = ReadableSamples(samples)
        batch: dict[str, ConceptSample] = {}
        mine = range(process, len(samples), processes)
        progress = progress_bar(len(mine), "samples", "completions", mininterval=5) if process == 0 else None
        with nullcontext() if progress is None else progress:
            for index in mine:
                sample = samples[index]
                # what stands in for another has its own turn
                if index not in samples.replacements:
                    digest = _digest(sample, self.processor)
                    if digest not in self._token_ids:
                        batch[digest] = sample
                if len(batch) == batch_size:
                    self._write(self._complete(model, batch), path)
                    batch = {}
                if progress is not None:
                    progress.update()
            if batch:
                self._write(self._complete(model, batch), path)

    def _write(self, rows: Iterable[dict], path: Path) -> None:
        rows = list(rows)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json_text(row) + "\n" for row in rows))
        except OSError as error:
            raise write_error(path, error) from error
        self._token_ids.update((row["inputs"], row["token_ids"]) for row in rows)

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


def _digest(sample: ConceptSample, processor: ConceptSegProcessor) -> str:
    """A hash of all that the VLM reads of a sample: the words, the picture, the references as they are shown."""
    references = resolve_references(sample.references, processor.canvas_size, processor.mosaic_settings)
    has_several = any(len(boxes) > 1 for boxes in references.all_boxes)
    boxes = references.all_boxes if has_several else references.boxes
    # default: numbers may be NumPy's
    words = json.dumps([sample.prompt, boxes, references.proxy], default=float)
    digest = hashlib.sha256(words.encode())
    for image in (load_image(sample.image), *references.images):
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _policy(model: ConceptSegForSegmentation, processor: ConceptSegProcessor, max_new_tokens: int) -> str:
    """A hash of everything but the sample that decides what the VLM writes."""
    settings = {
        "weights": fingerprint(model.vlm)["weights"],
        "prompt_template": processor.prompt_template,
        "canvas_size": processor.canvas_size,
        "coordinate_scale": processor.coordinate_scale,
        "max_new_tokens": max_new_tokens,
    }
    if processor.mosaic is not None:
        settings["mosaic"] = processor.mosaic
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
            os.truncate(path, content.rfind(b"\n") + 1)
