"""Measures which four of many references the VLM should be shown, if some of them are marked wrongly.

    python benchmarks/reference_selection.py                    # 24 concepts, 14 images each
    python benchmarks/reference_selection.py --development      # 25 other concepts, for choosing the method

The concepts are those of concept_prompts.py. Each has twelve references; in four of them, a rectangle beside the target
is marked. A concept is induced from all twelve, and the VLM reasons over the images with four of them: the first ones,
four at random, the most useful ones (`ConceptPrompt.useful_references`), and, as an upper bound, the first four that
are marked correctly. All arms segment the same images; differences are paired by image.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from concept_prompts import GREEDY, Concept, load_concepts

from conceptseg_hf import Reference
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.images import mask_to_image
from conceptseg_hf.induction import induce
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.rules import mask_ious

NUM_REFERENCES, NUM_WRONG, NUM_SHOWN = 12, 4, 4
FIRST, RANDOM, USEFUL, CORRECT = "first", "random", "most useful", "correct"


def wrong_mask(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A rectangle that does not touch the target."""
    while True:
        wrong = np.zeros_like(mask)
        x, y, side = rng.integers(8, 88), rng.integers(8, 88), rng.integers(12, 32)
        wrong[y : y + side, x : x + side] = True
        if not (wrong & mask).any():
            return wrong


def marked(concept: Concept, rng: np.random.Generator) -> tuple[list[Reference], set[int]]:
    """The references of a concept, and the indices of those that are marked wrongly."""
    wrong = set(rng.permutation(NUM_REFERENCES)[:NUM_WRONG].tolist())
    references = [
        Reference(image, mask=mask_to_image(wrong_mask(rng, mask) if number in wrong else mask))
        for number, (image, mask) in enumerate(concept.shown)
    ]
    return references, wrong


def main() -> None:
    """Runs all arms and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="embedded checkpoint, folder or hub id (default: nano)")
    parser.add_argument("--images", type=int, default=14, help="images per concept")
    parser.add_argument("--development", action="store_true", help="other concepts, for choosing the method")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(arguments.model, "cpu")
    ious, num_wrong = defaultdict(list), defaultdict(list)
    for number, concept in enumerate(load_concepts(arguments.images, NUM_REFERENCES, arguments.development)):
        rng = np.random.default_rng([5, number])
        references, wrong = marked(concept, rng)
        induced = induce(model, processor, concept.prompt, references)
        shown = {
            FIRST: range(NUM_SHOWN),
            RANDOM: rng.permutation(NUM_REFERENCES)[:NUM_SHOWN].tolist(),
            USEFUL: induced.useful_references(),
            CORRECT: [i for i in range(NUM_REFERENCES) if i not in wrong][:NUM_SHOWN],
        }
        for arm, indices in shown.items():
            inputs = processor(
                [image for image, _ in concept.targets], concept.prompt, [references[i] for i in indices]
            )
            results = model.segment(
                inputs, processor=processor, router="full_reasoning", generation_config=GREEDY
            )
            ious[arm] += mask_ious(results, [mask for _, mask in concept.targets])
            num_wrong[arm].append(len(wrong & set(indices)))
        means = "  ".join(f"{arm} {np.mean(each[-arguments.images :]):.3f}" for arm, each in ious.items())
        print(f"{concept.name:22} {means}", flush=True)
    print("| references | wrongly marked | fg IoU | minus the first four |")
    print("|---|---|---|---|")
    for arm, each in ious.items():
        difference = resample((np.array(each) - np.array(ious[FIRST])).tolist(), arm)
        change = interval_text(difference.interval(), 3, signed=True)
        print(f"| {arm} | {np.mean(num_wrong[arm]):.2f} | {np.mean(each):.3f} | {change} |")


if __name__ == "__main__":
    main()
