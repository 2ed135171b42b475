"""Measure what the concept tokens add: `python -m conceptseg_trainers.nano.evidence.concept_tokens CHECKPOINT...`.

The VLM writes one completion per sample (greedy decoding), and SAM 3 decodes it with six prompts: the box of the
completion, the noun of its answer, its answer, the concept tokens Z alone, Z with the noun, and Z with the answer. The
differences are therefore paired, and caused by the prompt alone. A seventh prompt, the ground-truth box, shows what
SAM 3 can do. Several checkpoints are treated as seeds of the same training: values are averaged over them before the
bootstrap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.boxes import Box
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.inference import text_boxes_to_sam
from conceptseg_hf.inputs import PreparedSample, known
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.sam_prompt import BOX_TEXT, ImageFeatures
from conceptseg_hf.writing import write_file

from ...experiments.tables import format_mean, mean_over_seeds, paired, plain_table
from ...from_scratch.command import require_checkpoint

PROMPTS = ("true box", "box", "noun", "text", "Z", "Z + noun", "Z + text")
DIFFERENCES = (("Z + text", "text"), ("Z + text", "box"), ("Z + noun", "noun"))
_SETS = {"test": None, "test-compositional": None, "test, which one": ["which one"]}
_BATCH = 25

Values = dict[str, dict[str, list[float | None]]]
"""Foreground IoU of each sample, by row of the table and prompt."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure checkpoints and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_trainers.nano.evidence.concept_tokens",
        description="Compare prompts of SAM 3 with and without concept tokens, for the same completions.",
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="one folder per seed")
    parser.add_argument(
        "--samples", type=int, default=300, help="samples of each split (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's default)")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}; use at least 1.")
    for checkpoint in arguments.checkpoints:
        require_checkpoint(parser, checkpoint, "train one with `make nano`")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = table([measure(checkpoint, arguments.samples) for checkpoint in arguments.checkpoints])
    sys.stdout.write(text)
    if arguments.output is not None:
        write_file(arguments.output, text)


def measure(checkpoint: Path, num_samples: int) -> Values:
    """Return the foreground IoUs of the first samples of each set whose concept is present."""
    model = ConceptSegForSegmentation.from_pretrained(checkpoint).eval()
    processor = ConceptSegProcessor.from_pretrained(checkpoint)
    values: Values = {}
    for name, groups in _SETS.items():
        split, _, _ = name.partition(",")
        benchmark = ConceptShapes(split, size=SIDE, groups=groups)
        samples = [s for s in (benchmark[i] for i in range(num_samples)) if s.present]
        progress = progress_bar(len(samples), "samples", f"{checkpoint.name}, {name}")
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            ious = prompt_ious(model, processor, batch)
            for row, sample in enumerate(batch):
                label = f"{name}: {sample.stratum or sample.level}"
                for prompt in PROMPTS:
                    values.setdefault(label, {}).setdefault(prompt, []).append(ious[prompt][row])
            progress.update(len(batch))
        progress.close()
    return values


@torch.no_grad()
def prompt_ious(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, samples: Sequence[ConceptSample]
) -> dict[str, list[float | None]]:
    """Decode one completion per sample with each prompt of SAM 3.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.

    Returns:
        The foreground IoU of each sample by prompt. Without a box in the completion, the mask of "box" is empty.
    """
    prepared = [processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples]
    generated = generate_with_states(
        model.vlm,
        processor.collate(prepared),
        {"max_new_tokens": 64},
        model.config.hidden_states_at,
        model.config.end_of_turn_state,
    )
    completions = [
        processor.decode_completion(ids[mask], item)
        for ids, mask, item in zip(generated.token_ids, generated.mask, prepared, strict=True)
    ]
    concepts = model.encode_concepts(generated.hidden_states, generated.state_mask)
    features = model.encode_image(
        torch.stack([known(item.sam_pixel_values, "sam_pixel_values") for item in prepared])
    )
    answers = [
        model.config.sam_text_prompt(c.answer, s.prompt) for c, s in zip(completions, samples, strict=True)
    ]
    nouns = [(answer.split() or [""])[-1] for answer in answers]
    logits = {
        "noun": model.decode_masks(features, *processor.sam_text(nouns))[0],
        "text": model.decode_masks(features, *processor.sam_text(answers))[0],
        "Z": model.decode_masks(features, concept_embeds=concepts)[0],
        "Z + noun": model.decode_masks(features, *processor.sam_text(nouns), concepts)[0],
        "Z + text": model.decode_masks(features, *processor.sam_text(answers), concepts)[0],
    }
    for name, boxes in (
        (
            "true box",
            [
                item.coordinates.image_box_to_text(s.box) if s.box else None
                for item, s in zip(prepared, samples)
            ],
        ),
        ("box", [completion.bbox for completion in completions]),
    ):
        logits[name] = _decode_boxes(model, processor, features, boxes, prepared, logits["text"])
    return {prompt: _ious(processor, logits[prompt], prepared, samples) for prompt in PROMPTS}


def _decode_boxes(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    features: ImageFeatures,
    text_boxes: Sequence[Box | None],
    prepared: Sequence[PreparedSample],
    like: Tensor,
) -> Tensor:
    """Return (B, 1, h, w) mask logits for boxes in text units; negative without a box."""
    logits = torch.full_like(like, -1.0)
    rows, boxes = text_boxes_to_sam(prepared, dict(enumerate(text_boxes)))
    if rows:
        text = processor.sam_text([BOX_TEXT] * len(rows))
        logits[rows] = model.decode_masks(features.select(torch.tensor(rows)), *text, boxes=boxes)[0]
    return logits


def _ious(
    processor: ConceptSegProcessor,
    logits: Tensor,
    prepared: Sequence[PreparedSample],
    samples: Sequence[ConceptSample],
) -> list[float | None]:
    masks = [
        processor.post_process_mask(row[0], item.coordinates)[0]
        for row, item in zip(logits, prepared, strict=True)
    ]
    return [
        foreground_iou(np.asarray(mask) > 0, np.asarray(sample.mask) > 0)
        for mask, sample in zip(masks, samples, strict=True)
    ]


def table(seeds: Sequence[Values]) -> str:
    """Format a Markdown table: foreground IoU by prompt, and paired differences with 95 % bootstrap intervals."""
    titles = [*PROMPTS, *(f"{prompt} - {baseline}" for prompt, baseline in DIFFERENCES)]
    rows = []
    for label in seeds[0]:
        values = {prompt: mean_over_seeds([seed[label][prompt] for seed in seeds]) for prompt in PROMPTS}
        cells = [format_mean(values[prompt]) for prompt in PROMPTS]
        for prompt, baseline in DIFFERENCES:
            interval = paired(values[prompt], values[baseline], f"{label}/{prompt}/{baseline}")
            cells.append(interval_text(interval, 3, signed=True))
        rows.append([label, str(len(values["box"])), *cells])
    return plain_table(["samples", "n", *titles], rows) + "\n"


if __name__ == "__main__":
    main()
