# /// script
# requires-python = ">=3.10"
# dependencies = ["conceptseg-hf"]
# ///
"""Segment one image with a text prompt.

    python examples/segment_image.py                                         # a ConceptShapes scene
    python examples/segment_image.py --image photo.jpg --prompt "red circle"
    python examples/segment_image.py --image photo.jpg --prompt "person" --model path/or/id

The default is the embedded checkpoint, which was trained on synthetic shapes and not on photos.
"""

from __future__ import annotations

import argparse

# Before transformers: registers the pipeline and makes torchvision importable with a CPU-only torch.
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.images import load_image
from conceptseg_hf.visualization import overlay

# isort: split
from transformers import pipeline


def main() -> None:
    """Segment the image, print the result and save the overlay."""
    parser = argparse.ArgumentParser(description="Segment one image with a text prompt.")
    parser.add_argument("--image", help="path or URL; a ConceptShapes scene by default")
    parser.add_argument("--prompt", help="what to segment; required with --image")
    parser.add_argument("--model", help="checkpoint folder or hub id")
    parser.add_argument(
        "--output", default="segment_image.png", help="image file to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.image and not arguments.prompt:
        parser.error("--image requires --prompt")

    sample = load_benchmark("concept-shapes", split="test")[0]
    image = load_image(arguments.image) if arguments.image else sample.image
    prompt = arguments.prompt or sample.prompt

    pipe = pipeline("concept-segmentation", model=arguments.model)
    result = pipe(image, prompt=prompt)
    print(f"{prompt!r}: {result['route']}, label {result['label']!r}, score {result['score']:.2f}")
    overlay(image, result["mask"]).save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
