"""Draw the figures of the README and the site with the embedded checkpoints: `python benchmarks/figures.py docs`.

The samples were not selected by result: the first ConceptShapes test samples with the checkpoint "nano", and below them
all photographs of the smoke set that ask for salient objects, with the checkpoint "mini".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import SMOKE_PHOTOS, ConceptSample, load_benchmark
from conceptseg_hf.evaluation.records import segment_samples
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.outputs import ConceptSegmentation
from conceptseg_hf.router import ROUTER_MODES
from conceptseg_hf.visualization import panel, scaled_overlay, side_by_side

HEIGHT = 220
LEVELS = {
    "CI": "by its looks (CI): SAM 3 alone",
    "CD": "by its context (CD)",
    "CR": "by a rule that references share (CR)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write overview.png, mosaic.png and routes.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the figures")
    folder = parser.parse_args(arguments).folder

    model, processor = load_model_and_processor(None, "cpu")
    samples = list(load_benchmark("concept-shapes", split="test", limit=60))
    firsts = [next(sample for sample in samples if sample.level == level) for level in LEVELS]
    photographs = draw_row(*load_model_and_processor("mini", "cpu"), salient_photos())
    save(stack([draw_row(model, processor, firsts), photographs]), folder / "overview.png")

    sample = firsts[-1]
    prepared = processor.prepare(sample.image, sample.prompt, sample.references)
    views = zip(("references: one box is withheld", "target image"), prepared.vlm_images, strict=True)
    save(side_by_side(list(views), height=280), folder / "mosaic.png")
    tiles = []
    for router in ROUTER_MODES:
        (result,) = segment_samples(model, processor, [sample], router=router)
        tiles.append((f"{router}: {result.route}", scaled_overlay(sample.image, result.mask, 280)))
    save(side_by_side(tiles, f"prompt: {sample.prompt}", 280), folder / "routes.png")


def salient_photos() -> list[ConceptSample]:
    """Return the photographs of the smoke set (whose license permits publication) with a prompt that "mini" is for."""
    samples = load_benchmark("plain", root=SMOKE_PHOTOS, split="test")
    return [sample for sample in samples if sample.group == "saliency"]


def draw_row(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, samples: Sequence[ConceptSample]
) -> Image.Image:
    """Segment samples and draw them beside each other."""
    results = segment_samples(model, processor, samples)
    return beside([draw(sample, result) for sample, result in zip(samples, results, strict=True)])


def draw(sample: ConceptSample, result: ConceptSegmentation) -> Image.Image:
    """Draw one sample: references, image with the predicted box, mask; prompt, rule and answer."""
    caption = [f"prompt: {sample.prompt}"]
    if result.route != "shortcut":
        caption += [f"rule: {result.rule or '-'}", f"answer: {result.answer or '-'}"]
    else:
        caption += [f"presence {result.presence:.2f}, threshold {result.threshold:.2f}"]
    references = sample.references if result.route == "reasoning" else ()
    drawn = panel(
        sample.image, result.mask, references, result.box, caption="\n".join(caption), height=HEIGHT
    )
    return side_by_side([(LEVELS[sample.level], drawn)], height=drawn.height)


def beside(images: list[Image.Image]) -> Image.Image:
    """Paste images beside each other on white."""
    canvas = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width
    return canvas


def stack(images: list[Image.Image]) -> Image.Image:
    """Paste images below each other on white."""
    canvas = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas


def save(image: Image.Image, path: Path) -> None:
    """Save an optimized PNG file; not with a palette, which would change the colors of small objects."""
    image.save(path, optimize=True)


if __name__ == "__main__":
    main()
