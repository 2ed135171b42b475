"""What each switch of the profile "released" changes: on the embedded checkpoint, on synthetic masks, by itself.

    python benchmarks/released.py [--samples 100]          needs conceptseg-hf[eval]

The numbers of the table in docs/weights.md.
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
    """The embedded checkpoint with one switch, and with all of them."""
    model, processor = load_model_and_processor(nano_checkpoint(), "cpu")
    options = {"limit": samples, "batch_size": 16, "metrics": ("miou",)}

    def run(**others: Any) -> tuple[float, list[dict]]:
        settings = {"benchmark": "concept-shapes", "processor": processor, **options, **others}
        report = evaluate(model, **settings)
        masks = MaskMetrics(metrics=("miou",))
        masks.merge(record["scores"] for record in report.records)
        return masks.compute()["miou"], report.records

    usual, first = run()
    print(f"nano, first {samples} samples of test, adaptive router: mIoU {usual:.2f}")

    def tell(name: str, found: float, records: list[dict]) -> None:
        pairs = list(zip(first, records, strict=True))
        masks = sum(a["mask"] != b["mask"] for a, b in pairs)
        texts = sum(a["completion"] != b["completion"] for a, b in pairs)
        routes = sum(a["route"] != b["route"] for a, b in pairs)
        print(f"  {name}: {found - usual:+.3f}; masks {masks}, completions {texts}, routes {routes} differ")

    for name, fields in CONFIG.items():
        with changed_settings(model.config, fields):
            tell(name, *run())
    for name, settings in PROCESSOR.items():
        tell(name, *run(processor=processor.with_settings(**settings)))
    tell("all, protocol standard", *run(profile="released", protocol="standard"))
    measure_states(model, processor, samples)

    # References of ConceptShapes have the size of their cells; larger ones are resampled.
    large = ConceptShapes("test", length=samples, size=150)
    usual, first = run(benchmark=large)
    print(f"nano, the same at 150 x 150: mIoU {usual:.2f}")
    bilinear = processor.with_settings(mosaic={"resampling": "bilinear"})
    tell("mosaic.resampling", *run(benchmark=large, processor=bilinear))


@torch.no_grad()
def measure_states(model: Any, processor: Any, samples: int) -> None:
    """How far Z goes with the end-of-turn token's state, over the norm of Z."""
    differences = []
    for sample in load_benchmark("concept-shapes", limit=min(samples, 50)):
        batch = processor.collate(
            [processor.prepare(sample.image, sample.prompt, sample.references, lazy=True)]
        )
        found = generate_with_states(model.vlm, batch, end_of_turn_state=True)
        without, with_end = (
            model.encode_concepts(found.hidden_states, mask) for mask in (found.mask, found.state_mask)
        )
        differences.append(float((with_end - without).norm() / without.norm()))
    mean, most = 100 * statistics.mean(differences), 100 * max(differences)
    print(f"  Z with the end-of-turn state: {mean:.1f} % away on average, {most:.1f} % at most")


def draw(chance: random.Random, size: tuple[int, int], area: float, soft: bool = False) -> Image.Image:
    """An ellipse, turned by chance, of a share of the image."""
    width, height = size
    ratio = chance.uniform(0.5, 2)
    a = (area * width * height * ratio / np.pi) ** 0.5
    b = a / ratio
    x, y = (chance.uniform(min(a, side / 2), max(side - a, side / 2)) for side in size)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((x - a, y - b, x + a, y + b), fill=255)
    mask = mask.rotate(chance.uniform(0, 90), center=(x, y))
    return mask.filter(ImageFilter.GaussianBlur(1.5)) if soft else mask


def moved(chance: random.Random, mask: Image.Image) -> np.ndarray:
    """What a good model may find: the mask, a little off and a little smaller."""
    found = mask.filter(ImageFilter.MinFilter(3))
    return np.roll(np.asarray(found) > 127, (chance.randint(-2, 2), chance.randint(-2, 2)), (0, 1))


def measure_masks() -> None:
    """Each part of the protocol, and boxes from cells, on synthetic masks."""
    chance = random.Random(0)
    sizes = [(640, 480), (500, 375), (1024, 768), (320, 240)]
    metrics = ("miou", "f_w", "ber", "s_measure")
    for soft in (False, True):
        for area in (0.002, 0.01, 0.1):
            scores = {name: MaskMetrics(name, metrics=metrics) for name in ("paper", "released")}
            for number in range(24):
                mask = draw(chance, sizes[number % 4], area, soft)
                hard = Image.fromarray((np.asarray(mask) > 127).astype(np.uint8) * 255)
                found = Image.fromarray(moved(chance, hard).astype(np.uint8) * 255).resize((600, 600))
                scores["paper"].update(np.asarray(found) > 127, hard)
                scores["released"].update(np.asarray(found) > 127, mask if soft else hard)
            values = {name: found.compute() for name, found in scores.items()}
            changes = ", ".join(
                f"{metric} {values['paper'][metric]:.2f} -> {values['released'][metric]:.2f}"
                for metric in metrics
            )
            print(f"24 {'soft' if soft else 'hard'} masks of {100 * area:g} % of the image: {changes}")

    pairs = [
        draw(chance, size, area) for size, area in zip([*sizes, (1600, 1200)], (0.3, 0.02, 0.2, 0.05, 0.1))
    ]
    found = [np.asarray(mask) > 127 for mask in pairs]
    found[1], found[3] = np.roll(found[1], 100, 1), np.zeros_like(found[3])
    values = {}
    for own_size in (False, True):
        scores = MaskMetrics("released", metrics=("ciou",))
        for mask, prediction in zip(pairs, found, strict=True):
            scores.update(Image.fromarray(prediction.astype(np.uint8) * 255), mask, own_size=own_size)
        values[own_size] = scores.compute()["ciou"]
    print(
        f"five masks of other sizes, cIoU: at 600 x 600 {values[False]:.1f}, at their own size {values[True]:.1f}"
    )

    offsets = []
    cell = MosaicSettings(boxes_from="cell")
    for number in range(200):
        mask = draw(chance, sizes[number % 4], 0.05)
        references = [Reference(Image.new("RGB", mask.size), mask=mask)] * 2
        exact, rounded = (resolve_references(references, 600, each).boxes[0] for each in (None, cell))
        scale = [300 / mask.width, 300 / mask.height] * 2
        offsets += [abs(a - b) * by for a, b, by in zip(exact, rounded, scale, strict=True)]
    print(
        f"boxes of 200 masks in cells of 300: {statistics.mean(offsets):.2f} canvas pixels away on average, "
        f"{max(offsets):.2f} at most"
    )


def measure_draws() -> None:
    """How many different references four draws with replacement give."""
    chance = random.Random(42)
    for size in (1, 3, 10, 100):
        different = [len({chance.randrange(size) for _ in range(4)}) for _ in range(10_000)]
        print(f"four draws from {size} images: {statistics.mean(different):.2f} different ones on average")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure_masks()
    measure_draws()
    measure_nano(arguments.samples)
