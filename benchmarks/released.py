"""Measure the effect of each setting of the profile "released", with the embedded checkpoint or synthetic masks.

    python benchmarks/released.py [--samples 100]          needs conceptseg-hf[eval]

The results are in the table of docs/weights.md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from conceptseg_trainers.loading import changed_settings
from PIL import Image, ImageDraw, ImageFilter

from conceptseg_hf import Reference, nano_checkpoint
from conceptseg_hf.data import ConceptShapes, load_benchmark
from conceptseg_hf.evaluation import MaskMetrics, evaluate
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.mosaic import MosaicSettings
from conceptseg_hf.references import resolve_references

CONFIG = {
    "end_of_turn_state": {"end_of_turn_state": True},
    "router_drop_parentheses, router_min_words": {"router_drop_parentheses": True, "router_min_words": 0},
    "missing_answer": {"missing_answer": "empty"},
    "max_total_length": {"max_total_length": 2816},
}
PROCESSOR = {
    "mosaic.corners": {"mosaic": {"corners": "inclusive"}},
    "mosaic.mark_single": {"mosaic": {"mark_single": False}},
    "shortcut_size": {"shortcut_size": 600},
    "sam_resampling, mask_resampling": {"sam_resampling": "bicubic", "mask_resampling": "bicubic"},
}


def measure_nano(samples: int) -> None:
    """Measure the embedded checkpoint with each setting and with all of them."""
    model, processor = load_model_and_processor(nano_checkpoint(), "cpu")
    options = {"limit": samples, "batch_size": 16, "metrics": ("miou",)}

    def run(**overrides: Any) -> tuple[float, list[dict]]:
        settings = {"benchmark": "concept-shapes", "processor": processor, **options, **overrides}
        report = evaluate(model, **settings)
        masks = MaskMetrics(metrics=("miou",))
        masks.merge(record["scores"] for record in report.records)
        return masks.compute()["miou"], report.records

    baseline, baseline_records = run()
    print(f"nano, first {samples} samples of test, adaptive router: mIoU {baseline:.2f}")

    def report_change(name: str, miou: float, records: list[dict]) -> None:
        pairs = list(zip(baseline_records, records, strict=True))
        masks = sum(a["mask"] != b["mask"] for a, b in pairs)
        texts = sum(a["completion"] != b["completion"] for a, b in pairs)
        routes = sum(a["route"] != b["route"] for a, b in pairs)
        print(f"  {name}: {miou - baseline:+.3f}; masks {masks}, completions {texts}, routes {routes} differ")

    for name, fields in CONFIG.items():
        with changed_settings(model.config, fields):
            report_change(name, *run())
    for name, settings in PROCESSOR.items():
        report_change(name, *run(processor=processor.with_settings(**settings)))
    report_change("all, protocol standard", *run(profile="released", protocol="standard"))
    measure_states(model, processor, samples)

    # The references of ConceptShapes already have the size of a cell; only larger ones are resampled.
    large = ConceptShapes("test", length=samples, size=150)
    baseline, baseline_records = run(benchmark=large)
    print(f"nano, the same at 150 x 150: mIoU {baseline:.2f}")
    bilinear = processor.with_settings(mosaic={"resampling": "bilinear"})
    report_change("mosaic.resampling", *run(benchmark=large, processor=bilinear))


@torch.no_grad()
def measure_states(model: Any, processor: Any, samples: int) -> None:
    """Measure the relative change of Z if the state of the end-of-turn token is included."""
    differences = []
    for sample in load_benchmark("concept-shapes", limit=min(samples, 50)):
        batch = processor.collate(
            [processor.prepare(sample.image, sample.prompt, sample.references, lazy=True)]
        )
        generated = generate_with_states(model.vlm, batch, end_of_turn_state=True)
        without, with_end = (
            model.encode_concepts(generated.hidden_states, mask)
            for mask in (generated.mask, generated.state_mask)
        )
        differences.append(float((with_end - without).norm() / without.norm()))
    mean, maximum = 100 * statistics.mean(differences), 100 * max(differences)
    print(f"  change of Z with the end-of-turn state: {mean:.1f} % on average, {maximum:.1f} % at most")


def draw(rng: random.Random, size: tuple[int, int], area: float, soft: bool = False) -> Image.Image:
    """Draw a randomly rotated ellipse that covers the given fraction of the image."""
    width, height = size
    ratio = rng.uniform(0.5, 2)
    a = (area * width * height * ratio / np.pi) ** 0.5
    b = a / ratio
    x, y = (rng.uniform(min(a, side / 2), max(side - a, side / 2)) for side in size)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((x - a, y - b, x + a, y + b), fill=255)
    mask = mask.rotate(rng.uniform(0, 90), center=(x, y))
    return mask.filter(ImageFilter.GaussianBlur(1.5)) if soft else mask


def moved(rng: random.Random, mask: Image.Image) -> np.ndarray:
    """Return a slightly shifted and eroded mask, similar to the prediction of a good model."""
    eroded = mask.filter(ImageFilter.MinFilter(3))
    return np.roll(np.asarray(eroded) > 127, (rng.randint(-2, 2), rng.randint(-2, 2)), (0, 1))


def measure_masks() -> None:
    """Measure each part of the protocol, and boxes from cells, on synthetic masks."""
    rng = random.Random(0)
    sizes = [(640, 480), (500, 375), (1024, 768), (320, 240)]
    metrics = ("miou", "f_w", "ber", "s_measure")
    for soft in (False, True):
        for area in (0.002, 0.01, 0.1):
            scores = {name: MaskMetrics(name, metrics=metrics) for name in ("paper", "released")}
            for number in range(24):
                mask = draw(rng, sizes[number % 4], area, soft)
                hard = Image.fromarray((np.asarray(mask) > 127).astype(np.uint8) * 255)
                prediction = Image.fromarray(moved(rng, hard).astype(np.uint8) * 255).resize((600, 600))
                scores["paper"].update(np.asarray(prediction) > 127, hard)
                scores["released"].update(np.asarray(prediction) > 127, mask if soft else hard)
            values = {name: metric.compute() for name, metric in scores.items()}
            changes = ", ".join(
                f"{metric} {values['paper'][metric]:.2f} -> {values['released'][metric]:.2f}"
                for metric in metrics
            )
            print(f"24 {'soft' if soft else 'hard'} masks of {100 * area:g} % of the image: {changes}")

    masks = [draw(rng, size, area) for size, area in zip([*sizes, (1600, 1200)], (0.3, 0.02, 0.2, 0.05, 0.1))]
    predictions = [np.asarray(mask) > 127 for mask in masks]
    predictions[1], predictions[3] = np.roll(predictions[1], 100, 1), np.zeros_like(predictions[3])
    values = {}
    for own_size in (False, True):
        scores = MaskMetrics("released", metrics=("ciou",))
        for mask, prediction in zip(masks, predictions, strict=True):
            scores.update(Image.fromarray(prediction.astype(np.uint8) * 255), mask, own_size=own_size)
        values[own_size] = scores.compute()["ciou"]
    print(
        f"five masks of different sizes, cIoU: at 600 x 600 {values[False]:.1f}, at original size {values[True]:.1f}"
    )

    offsets = []
    cell = MosaicSettings(boxes_from="cell")
    for number in range(200):
        mask = draw(rng, sizes[number % 4], 0.05)
        references = [Reference(Image.new("RGB", mask.size), mask=mask)] * 2
        exact, rounded = (resolve_references(references, 600, settings).boxes[0] for settings in (None, cell))
        scale = [300 / mask.width, 300 / mask.height] * 2
        offsets += [abs(a - b) * factor for a, b, factor in zip(exact, rounded, scale, strict=True)]
    print(
        f"boxes of 200 masks in cells of 300: offset of {statistics.mean(offsets):.2f} canvas pixels on average, "
        f"{max(offsets):.2f} at most"
    )


def measure_draws() -> None:
    """Measure the number of distinct references in four draws with replacement."""
    rng = random.Random(42)
    for size in (1, 3, 10, 100):
        distinct = [len({rng.randrange(size) for _ in range(4)}) for _ in range(10_000)]
        print(f"four draws from {size} images: {statistics.mean(distinct):.2f} distinct ones on average")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure_masks()
    measure_draws()
    measure_nano(arguments.samples)
