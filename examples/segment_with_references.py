# /// script
# requires-python = ">=3.10"
# dependencies = ["conceptseg-hf"]
# ///
"""Segment by example: the model induces the rule from reference images that show the concept.

    python examples/segment_with_references.py
    python examples/segment_with_references.py --model path/or/id --output panel.png

Uses a consistency task of ConceptShapes: what do the marked objects have in common? Create your own references from
paths: Reference("a.jpg", mask="a_mask.png") or Reference("b.jpg", box=(x1, y1, x2, y2)).
"""

from __future__ import annotations

import argparse

# Before transformers: registers the pipeline and makes torchvision importable with a CPU-only torch.
from conceptseg_hf import Reference
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.visualization import panel

# isort: split
from transformers import pipeline


def main() -> None:
    """Segment the target, print rule and answer, and save the panel."""
    parser = argparse.ArgumentParser(description="Segment by example.")
    parser.add_argument("--model", help="checkpoint folder or hub id; the embedded checkpoint by default")
    parser.add_argument(
        "--output", default="segment_with_references.png", help="image file to write (default: %(default)s)"
    )
    arguments = parser.parse_args()

    sample = next(
        sample for sample in load_benchmark("concept-shapes", split="test") if sample.group == "consistency"
    )
    references = [Reference(reference.image, box=reference.box) for reference in sample.references]

    pipe = pipeline("concept-segmentation", model=arguments.model)
    result = pipe(sample.image, prompt=sample.prompt, references=references, router="full_reasoning")
    print(
        f"prompt: {sample.prompt}\nrule:   {result['rule']}\nanswer: {result['answer']} (ground truth: {sample.answer})"
    )

    check = None if result["check"] is None else (result["check_reference"], result["check"])
    picture = panel(
        sample.image,
        result["mask"],
        references=references,
        box=result["box"],
        check=check,
        ground_truth=sample.mask,
        caption=f"{sample.prompt}\nrule: {result['rule']}\nanswer: {result['answer']}",
    )
    picture.save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
