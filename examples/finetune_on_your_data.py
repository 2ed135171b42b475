# /// script
# requires-python = ">=3.10"
# dependencies = ["conceptseg-hf[train]"]
# ///
"""Fine-tune on a folder of your images with masks, and compare before and after on held-out images.

    python examples/finetune_on_your_data.py --root my_data --images 20,100,300
    python examples/finetune_on_your_data.py --root my_data --images 100 --methods tokens --model path/or/id

The folder has the layout `plain` (docs/own_data.md) with the splits "train" and "test" and one prompt. Held-out images
that are duplicates of training images are left out. docs/finetune.md explains the methods and shows results:

- tokens: concept tokens in SAM 3's prompt space; all weights stay as they are.
- ctm: stage I, the Concept Translation Module (as `conceptseg train sft`); also as a concept without the VLM.
- lora: concept tokens and a low-rank adapter of SAM 3's DETR and mask decoder.
- lora-encoder: the same with an adapter of SAM 3's image encoder, too; several times as long (--methods lora-encoder).

A repeated command uses what the output folder already holds. Apply a result with

    conceptseg segment photo.jpg --concept finetuned/tokens-100/concept.safetensors --router sam_only
    conceptseg segment photo.jpg --concept finetuned/lora-100/concept.safetensors --model finetuned/lora-100 \
        --router sam_only
    conceptseg segment photo.jpg --prompt "the scratch" --model finetuned/ctm-100
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptseg_hf import ConceptPrompt, Reference
from conceptseg_hf.concept_tuning import TuningOptions, tune_concept
from conceptseg_hf.data import ConceptSample, load_benchmark
from conceptseg_hf.data.duplicates import find_duplicates
from conceptseg_hf.evaluation import evaluate_masks
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.evaluation.reporting.tables import interval_text, markdown_table
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.visualization import overlay

REFERENCES = 4  # shown to the VLM
SHOWN = 6  # held-out images in the picture: the first ones
SIDE, HEADING = 200, 16  # pixels of an image in the picture, and of its heading
Predict = Callable[[ConceptSample], Image.Image]


@dataclass(frozen=True)
class Result:
    """An evaluated row of the table.

    Attributes:
        name: Name of the row.
        images: Number of training images; None before fine-tuning.
        minutes: CPU minutes of the fine-tuning.
        ious: Foreground IoU of each held-out image.
        masks: Masks of the first held-out images.
    """

    name: str
    images: int | None
    minutes: float | None
    ious: list[float]
    masks: list[Image.Image]


class Finetuning:
    """Data, settings and output folder of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        train = load_benchmark("plain", arguments.root, "train")
        test = load_benchmark("plain", arguments.root, "test")
        copies = {name for pair in find_duplicates(test, train).found for name in pair.sample_ids}
        chosen = [i for i, item in enumerate(test.items) if item.sample_id not in copies]
        print(
            f"{len(train)} training images, {len(test)} held-out images, {len(copies)} of these are duplicates"
        )
        if not chosen:
            raise SystemExit(
                "all held-out images are duplicates of training images; split the data by object."
            )
        chosen = chosen[: arguments.test_limit]
        prompts = {item.prompt for item in train.items}
        if len(prompts) > 1:
            raise SystemExit(f"the folder has {len(prompts)} prompts; use one folder per concept.")
        (self.prompt,) = prompts
        order = list(range(len(train)))
        random.Random(arguments.seed).shuffle(order)
        needed = max(arguments.images)
        shuffled = (train[i] for i in order)
        self.train = [sample for sample, _ in zip((s for s in shuffled if s.present), range(needed))]
        shown = [as_reference(sample) for sample in self.train[:REFERENCES]]
        self.test = [replace(test[i], references=shown) for i in chosen]

    def load(self, folder: Path | None = None):
        """Model and processor: the given checkpoint, or a fine-tuned one."""
        return load_model_and_processor(
            folder or self.arguments.model, self.arguments.device, self.arguments.dtype
        )

    def evaluate(self, name: str, predict: Predict, images: int | None, minutes: float | None) -> Result:
        """Evaluate on the held-out images; existing records are used."""
        label = name if images is None else f"{name}-{images}"
        settings = {
            "checkpoint": self.arguments.model,
            "images": images,
            "training_seed": self.arguments.seed,
        }
        folder = self.folder / "evaluations" / label
        report = evaluate_masks(predict, self.test, label, folder, settings, progress=True)
        ious = [record["foreground_iou"] for record in report.records]
        return Result(name, images, minutes, ious, [predict(sample) for sample in self.test[:SHOWN]])


def as_reference(sample: ConceptSample) -> Reference:
    """A sample as a reference with its mask."""
    return Reference(sample.image, mask=sample.mask)


def predictor(model, processor, router: str, concept: ConceptPrompt | None = None) -> Predict:
    """Return the function that segments a sample."""

    def predict(sample: ConceptSample) -> Image.Image:
        references = sample.references if router == "full_reasoning" else []
        inputs = processor([sample.image], sample.prompt, references or None)
        (result,) = model.segment(inputs, processor=processor, router=router, concept=concept)
        if result.mask is None:
            raise ValueError(result.error)
        return result.mask

    return predict


def timed(folder: Path, train: Callable[[], None]) -> float:
    """Train unless the folder is complete; return the CPU minutes of the training."""
    record = folder / "minutes.json"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        train()
        record.write_text(json.dumps((time.process_time() - start) / 60))
    return float(json.loads(record.read_text()))


def finetune_tokens(run: Finetuning, count: int) -> list[Result]:
    """Tune concept tokens; no weight changes."""
    folder = run.folder / f"tokens-{count}"
    model, processor = run.load()

    def train() -> None:
        references = [as_reference(sample) for sample in run.train[:count]]
        options = TuningOptions(steps=run.arguments.steps, seed=run.arguments.seed)
        concept = tune_concept(model, processor, run.prompt, references, options=options, progress=True)
        concept.save(folder / "concept.safetensors")

    minutes = timed(folder, train)
    concept = ConceptPrompt.load(folder / "concept.safetensors")
    return [run.evaluate("tokens", predictor(model, processor, "sam_only", concept), count, minutes)]


def finetune_lora(run: Finetuning, count: int, name: str = "lora") -> list[Result]:
    """Tune concept tokens together with an adapter of SAM 3."""
    from conceptseg_trainers.sam_lora import tune_concept_with_lora

    folder = run.folder / f"{name}-{count}"

    def train() -> None:
        model, processor = run.load()
        references = [as_reference(sample) for sample in run.train[:count]]
        options = TuningOptions(steps=run.arguments.steps, seed=run.arguments.seed)
        concept = tune_concept_with_lora(
            model,
            processor,
            run.prompt,
            references,
            options=options,
            progress=True,
            adapt_encoder=name == "lora-encoder",
        )
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        concept.save(folder / "concept.safetensors")

    minutes = timed(folder, train)
    model, processor = run.load(folder)
    concept = ConceptPrompt.load(folder / "concept.safetensors")
    return [run.evaluate(name, predictor(model, processor, "sam_only", concept), count, minutes)]


def finetune_ctm(run: Finetuning, count: int) -> list[Result]:
    """Stage I on the images; then the mean concept tokens of the training images as a concept without the VLM."""
    from conceptseg_trainers import ConceptSFTConfig, ConceptSFTTrainer

    folder = run.folder / f"ctm-{count}"

    def train() -> None:
        model, processor = run.load()
        rng = random.Random(run.arguments.seed)
        samples = []
        for sample in run.train[:count]:
            others = [other for other in run.train[:count] if other is not sample]
            shown = rng.sample(others, min(REFERENCES, len(others)))
            samples.append(replace(sample, references=list(map(as_reference, shown))))
        arguments = ConceptSFTConfig(
            str(folder / "run"),
            max_steps=run.arguments.ctm_steps,
            per_device_train_batch_size=8,
            learning_rate=run.arguments.ctm_learning_rate,
            completion_source="template",
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            log_examples=0,
            logging_steps=25,
            seed=run.arguments.seed,
        )
        trainer = ConceptSFTTrainer(model, arguments, samples, processing_class=processor)
        trainer.train()
        trainer.save_model(str(folder))
        batch = trainer.data_collator(samples[:16])
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("shown", "mask_labels", "ignored")
        }
        with torch.no_grad():
            tokens = model.eval()(**inputs).concept_embeds.float().mean(0).cpu()
        ConceptPrompt(run.prompt, (run.prompt,), concept_embeds=tokens).save(folder / "concept.safetensors")

    minutes = timed(folder, train)
    model, processor = run.load(folder)
    concept = ConceptPrompt.load(folder / "concept.safetensors")
    return [
        run.evaluate("ctm", predictor(model, processor, "full_reasoning"), count, minutes),
        run.evaluate("ctm as concept", predictor(model, processor, "sam_only", concept), count, minutes),
    ]


FINETUNE = {
    "tokens": finetune_tokens,
    "ctm": finetune_ctm,
    "lora": finetune_lora,
    "lora-encoder": partial(finetune_lora, name="lora-encoder"),
}


def table(results: Sequence[Result]) -> list[str]:
    """Foreground IoU with 95 % bootstrap intervals, and the paired difference to SAM 3 on the words."""
    rows = []
    for result in results:
        difference = np.subtract(result.ious, results[0].ious).tolist()
        rows.append(
            [
                result.name,
                "-" if result.images is None else str(result.images),
                interval_text(resample(result.ious, "iou").interval(), 3),
                "-"
                if result is results[0]
                else interval_text(resample(difference, "gain").interval(), 3, signed=True),
                "-" if result.minutes is None else f"{result.minutes:.2f}",
            ]
        )
    heading = ["method", "images", "fg IoU", "minus SAM 3 on the words", "CPU minutes"]
    return markdown_table(heading, rows)


def picture(samples: Sequence[ConceptSample], columns: Sequence[Result]) -> Image.Image:
    """One row per held-out image: the image, the ground truth, and the mask of each result."""
    shown = samples[:SHOWN]
    canvas = Image.new("RGB", ((2 + len(columns)) * SIDE, len(shown) * SIDE + HEADING), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(("image", "ground truth", *(result.name for result in columns))):
        draw.text((column * SIDE, 2), name, fill="black")
    for row, sample in enumerate(shown):
        masks = [sample.mask, *(result.masks[row] for result in columns)]
        images = [sample.image.convert("RGB"), *(overlay(sample.image, mask) for mask in masks)]
        for column, image in enumerate(images):
            canvas.paste(image.resize((SIDE - 4, SIDE - 4)), (column * SIDE, row * SIDE + HEADING))
    return canvas


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, evaluate, print the table and save the picture."""
    parser = argparse.ArgumentParser(description="Fine-tune on your own images with masks.")
    parser.add_argument("--root", required=True, help="folder in the layout `plain`")
    parser.add_argument(
        "--model", default="nano", help="embedded checkpoint, folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--device", help="device; an accelerator by default, else the CPU")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16 (default: that of the checkpoint)")
    parser.add_argument("--methods", default="tokens,ctm,lora", help="(default: %(default)s)")
    parser.add_argument(
        "--images", default="20,100,300", help="numbers of training images (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of all methods but ctm (default: %(default)s)"
    )
    parser.add_argument("--ctm-steps", type=int, default=150, help="steps of ctm (default: %(default)s)")
    parser.add_argument(
        "--ctm-learning-rate", type=float, default=3e-4, help="for 3B and 7B: 3e-5 (default: %(default)s)"
    )
    parser.add_argument("--test-limit", type=int, help="maximum number of held-out images")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output-dir", default="finetuned", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    methods = arguments.methods.split(",")
    if unknown := [name for name in methods if name not in FINETUNE]:
        parser.error(f"no method is named {unknown[0]!r}; use some of {', '.join(FINETUNE)}")
    arguments.images = sorted({int(count) for count in arguments.images.split(",")})

    run = Finetuning(arguments)
    counts = sorted({min(count, len(run.train)) for count in arguments.images})
    model, processor = run.load()
    results = [
        run.evaluate("SAM 3 on the words", predictor(model, processor, "sam_only"), None, None),
        run.evaluate(
            "full reasoning, 4 references", predictor(model, processor, "full_reasoning"), None, None
        ),
    ]
    for method in methods:
        for count in counts:
            results += FINETUNE[method](run, count)
    columns = [result for result in results if result.images in (None, counts[-1])]
    picture(run.test, columns).save(run.folder / "held_out.png")
    lines = table(results)
    (run.folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(
        f"{run.folder / 'held_out.png'}: {len(columns)} columns after image and ground truth, in the order of the table"
    )


if __name__ == "__main__":
    main()
