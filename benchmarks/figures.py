"""Draw the figures of the README and the site with the embedded checkpoint: `python benchmarks/figures.py docs`.

Each figure shows the first ConceptShapes test samples of its kind, which were not selected by result.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from conceptseg_hf.data import ConceptSample, load_benchmark
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


def main(folder: Path) -> None:
    """Write overview.png, mosaic.png and routes.png."""
    model, processor = load_model_and_processor(None, "cpu")
    samples = list(load_benchmark("concept-shapes", split="test", limit=60))
    firsts = [next(sample for sample in samples if sample.level == level) for level in LEVELS]
    results = segment_samples(model, processor, firsts)
    panels = [draw(sample, result) for sample, result in zip(firsts, results, strict=True)]
    save(beside(panels), folder / "overview.png")

    sample = firsts[-1]
    prepared = processor.prepare(sample.image, sample.prompt, sample.references)
    views = zip(("references: one box is withheld", "target image"), prepared.vlm_images, strict=True)
    save(side_by_side(list(views), height=280), folder / "mosaic.png")
    tiles = []
    for router in ROUTER_MODES:
        (result,) = segment_samples(model, processor, [sample], router=router)
        tiles.append((f"{router}: {result.route}", scaled_overlay(sample.image, result.mask, 280)))
    save(side_by_side(tiles, f"prompt: {sample.prompt}", 280), folder / "routes.png")


def draw(sample: ConceptSample, result: ConceptSegmentation) -> Image.Image:
    """Draw one sample: references, image with the predicted box, mask; prompt, rule and answer."""
    caption = [f"prompt: {sample.prompt}"]
    if result.rule is not None:
        caption += [f"rule: {result.rule}", f"answer: {result.answer}"]
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


def save(image: Image.Image, path: Path) -> None:
    """Save an optimized PNG file."""
    image.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
