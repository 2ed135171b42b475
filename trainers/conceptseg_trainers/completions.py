"""Completions that the CTM reads in stage I: ground truth, templates, or cached generations of the frozen VLM."""

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

_GT_FIELDS = ("think", "rule", "answer")
# Stage I of the released code: a space in each tag except <bbox>, and neither <rule> nor <check>.
_RELEASED_TEMPLATE = " <think> </think> <color> </color><bbox>{box}</bbox> <answer> </answer>"
_RELEASED_SAM_TEXT = "visual"


@dataclass(frozen=True)
class TrainingCompletion:
    """A completion for teacher forcing.

    Attributes:
        text: Text of the completion, or its token ids without the end-of-turn token.
        sam_text: Text prompt of SAM 3.
        rule: Rule of the completion, shown in the example images.
        is_truncated: Whether the completion was generated and truncated at the length limit, so that it has no
            end-of-turn token.
    """

    text: str | list[int]
    sam_text: str
    rule: str | None = None
    is_truncated: bool = False


def ground_truth_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """Return the sample's reasoning, rule, boxes and answer, or `template_completion` if one of them is missing."""
    texts = _gt_texts(sample)
    if texts is None:
        return template_completion(sample, frame, processor)
    _, rule, answer = texts
    return TrainingCompletion(_write(sample, frame, processor, *texts), answer, rule)


def has_reasoning(sample: ConceptSample) -> bool:
    """Whether a sample has ground-truth reasoning, rule and answer."""
    return _gt_texts(sample) is not None


def _gt_texts(sample: ConceptSample) -> tuple[str, str, str] | None:
    """Return reasoning, rule and answer of a sample, or None if one of them is missing."""
    think, rule, answer = sample.think, sample.rule, sample.answer
    return None if think is None or rule is None or answer is None else (think, rule, answer)


def check_sample_texts(sample: ConceptSample, processor: ConceptSegProcessor, source: str) -> None:
    """Check the texts of a sample before training, as inference checks a prompt.

    Args:
        sample: The sample.
        processor: Processor that defines the reserved tokens.
        source: See `ConceptSFTConfig.completion_source`; determines which texts are written into completions.

    Raises:
        ValueError: If the prompt cannot be used, or a text of the completion contains a reserved token or a tag.
    """
    processor.check_prompt(sample.prompt)
    written: dict[str, str] = {}
    if source == "ground_truth" and has_reasoning(sample):
        written = {name: getattr(sample, name) for name in _GT_FIELDS}
    elif source in ("ground_truth", "template"):
        written = {"prompt": sample.prompt} if sample.answer is None else {"answer": sample.answer}
    for name, text in written.items():
        processor.check_text(text, name)
        tag = find_markup(text) if name == "answer" else find_template_tag(text)
        if tag is not None:
            raise ValueError(f"{name} contains the tag {tag}, which is reserved in completions; remove it.")


def resolve_completion_source(
    samples: Sequence[ConceptSample], args: ConceptSFTConfig, list_some: bool = True
) -> None:
    """Switch to templated completions, with a warning, if the samples have no reasoning, rule and answer.

    The decision is based on a few samples. A sample without these texts gets a templated completion in any case.

    Args:
        samples: The samples to train on.
        args: The settings; `completion_source` may change from `"ground_truth"` to `"template"`.
        list_some: Whether to warn as well if only some of the samples lack these texts.
    """
    if args.completion_source != "ground_truth":
        return
    checked = list(_readable_samples(samples))
    lacking = [sample for sample in checked if not has_reasoning(sample)]
    fallback = "completions are built from the boxes and from the answer or the prompt"
    if lacking and len(lacking) == len(checked):
        args.completion_source = "template"
        logger.warning(
            "the samples have no think, rule and answer: %s (completion_source=template).", fallback
        )
    elif lacking and list_some:
        logger.warning(
            "%d of the %d samples checked, such as %r, have no think, rule and answer: %s.",
            len(lacking),
            len(checked),
            lacking[0].sample_id,
            fallback,
        )


def _readable_samples(samples: Sequence[ConceptSample]) -> Iterator[ConceptSample]:
    """Yield the samples at a few indices that can be read."""
    for index in spread_indices(len(samples)):
        with suppress(UnreadableSampleError):
            if isinstance(sample := samples[index], ConceptSample):
                yield sample


def template_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """Return the sample's boxes and its answer (or its prompt), with empty reasoning and rule."""
    answer = sample.answer or sample.prompt
    return TrainingCompletion(_write(sample, frame, processor, "", "", answer), answer)


def released_completion(
    sample: ConceptSample, frame: CoordinateFrame, processor: ConceptSegProcessor
) -> TrainingCompletion:
    """Return the target box, as a Python list, between blank tags; the text prompt of SAM 3 is "visual"."""
    box = (0.0, 0.0, 0.0, 0.0) if sample.box is None else frame.image_box_to_text(sample.box)
    box_text = format_box_list([box], processor.coordinate_scale)[1:-1]
    return TrainingCompletion(_RELEASED_TEMPLATE.format(box=box_text), _RELEASED_SAM_TEXT)


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
    """On-disk cache of the completions of one frozen VLM: a folder of JSON Lines files with one completion per line.

    Each process appends to its own file and reads all files, so that an interrupted run can be resumed with any number
    of processes. An entry is identified by the inputs of the VLM (prompt, image, references), not by the name of the
    sample, so that datasets may share a folder. Entries of another VLM, template, canvas size or length limit are
    ignored.

    Args:
        folder: Folder of the files, which `generate` creates if it is missing.
        model: Model that contains the VLM.
        processor: Processor that formats the prompts.
        max_new_tokens: Maximum number of tokens of a completion.
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
        """Read the entries that all processes have written so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            self._token_ids.update(
                (row["inputs"], row["token_ids"])
                for row in _rows(path)
                # early versions identified entries by the sample's name only
                if row["policy"] == self.policy and "inputs" in row
            )

    def completion(self, sample: ConceptSample) -> TrainingCompletion:
        """Return the cached completion of a sample; the text prompt of SAM 3 is the one that inference would use."""
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
        """Generate, with greedy decoding, the missing completions of every `processes`-th sample.

        Args:
            model: The model that the cache was created for.
            samples: The samples; their references are used as they are (not composed at random).
            batch_size: Number of prompts per batch.
            process: Rank of this process.
            processes: Number of processes that share the samples.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        path = self.folder / f"completions-{process:05d}.jsonl"
        _drop_incomplete_line(path)
        if not isinstance(samples, ReadableSamples):
            samples = ReadableSamples(samples)
        batch: dict[str, ConceptSample] = {}
        indices = range(process, len(samples), processes)
        progress = (
            progress_bar(len(indices), "samples", "completions", mininterval=5) if process == 0 else None
        )
        with nullcontext() if progress is None else progress:
            for index in indices:
                sample = samples[index]
                # a replacement is processed at its own index
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
                # only for readers of the file
                "sample": "/".join((sample.dataset, sample.split, sample.sample_id)),
                "text": self.processor.tokenizer.decode(ids),
                "inputs": digest,
                "policy": self.policy,
                "token_ids": ids,
            }


def _digest(sample: ConceptSample, processor: ConceptSegProcessor) -> str:
    """Hash everything that the VLM reads of a sample: the prompt, the image, and the references as they are drawn."""
    references = resolve_references(sample.references, processor.canvas_size, processor.mosaic_settings)
    has_several = any(len(boxes) > 1 for boxes in references.all_boxes)
    boxes = references.all_boxes if has_several else references.boxes
    # `default=float` handles NumPy scalars.
    text = json.dumps([sample.prompt, boxes, references.proxy], default=float)
    digest = hashlib.sha256(text.encode())
    for image in (load_image(sample.image), *references.images):
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _policy(model: ConceptSegForSegmentation, processor: ConceptSegProcessor, max_new_tokens: int) -> str:
    """Hash everything except the sample that determines the completion of the VLM."""
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
    """Yield the rows of a file, without a last line that was truncated when a run was killed."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _drop_incomplete_line(path: Path) -> None:
    """Truncate the file after its last complete line, so that the next line is not appended to an incomplete one."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
