"""Measures induced concepts against full reasoning on every image.

    python benchmarks/concept_prompts.py                    # 24 concepts, 14 images each, two inductions

Concepts: the six CD families of ConceptShapes, and 18 attribute rules of its hidden-rule grammar (color, shape, texture
and pairs of these). The references of a concept are drawn from the split "val", its images from the split "test"; the
scenes of a rule are drawn with separate seeds. All arms segment the same images. Differences are paired
by image, after the mean over inductions.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from PIL import Image

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, Reference, nano_checkpoint
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.families.hidden_rule import PROMPT, Rule, rule_scene
from conceptseg_hf.data.concept_shapes.rendering import COLORS, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.images import mask_to_image
from conceptseg_hf.induction import induce

FAMILIES = ("camouflage", "shadow", "transparent", "anomaly", "lesion", "saliency")
GREEDY = {"max_new_tokens": 64}
SIZE = 128
Example = tuple[Image.Image, np.ndarray]


def rules() -> list[Rule]:
    """Six rules of one color, shape or texture each, and six pairs of color and shape."""
    colors, shapes, textures = list(COLORS), list(SHAPES), list(TEXTURES[1:])
    single = [
        Rule(((kind, word),)) for kind, words in (("color", colors), ("shape", shapes)) for word in words[:5]
    ]
    single += [Rule((("texture", word),)) for word in textures[:2]]
    pairs = [(c, s) for c, s in zip(colors[:8], shapes[:8]) if (c, s) not in HELD_OUT_PAIRS]
    return [*single, *(Rule((("color", c), ("shape", s))) for c, s in pairs[:6])]


def rule_examples(rule: Rule, number: int, count: int, stream: int) -> list[Example]:
    """Scenes in which exactly one object satisfies a rule."""
    rng = np.random.default_rng([991, number, stream])
    scenes = [rule_scene(rng, SIZE, rule)[0] for _ in range(count)]
    return [(Image.fromarray(scene.pixels), scene.objects[0].mask) for scene in scenes]


def family_examples(family: str, split: str, count: int) -> tuple[str, list[Example]]:
    """The prompt of a CD family and its first samples."""
    samples = ConceptShapes(split, size=SIZE)
    found = [samples[i] for i in range(24 * count) if samples.slot(i).family.__name__ == family][:count]
    return found[0].prompt, [(sample.image, np.asarray(sample.mask) > 0) for sample in found]


def main() -> None:
    """Runs all arms and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(nano_checkpoint()))
    parser.add_argument("--images", type=int, default=14, help="images per concept")
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--inductions", type=int, default=2)
    parser.add_argument("--concepts", type=int, help="only the first N concepts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = ConceptSegForSegmentation.from_pretrained(arguments.model)
    processor = ConceptSegProcessor.from_pretrained(arguments.model)

    need = arguments.references * arguments.inductions
    concepts: list[tuple[str, str, list[Example], list[Example]]] = []
    for family in FAMILIES:
        prompt, shown = family_examples(family, "val", need)
        concepts.append((family, prompt, shown, family_examples(family, "test", arguments.images)[1]))
    for number, rule in enumerate(rules()):
        shown = rule_examples(rule, number, need, 0)
        concepts.append((rule.phrase, PROMPT, shown, rule_examples(rule, number, arguments.images, 1)))
    concepts = concepts[: arguments.concepts]

    arms = (
        *("words", "full reasoning", "rule", "concept", "concept and refined"),
        *("router", "router and refined"),
    )
    values: dict[str, list[float]] = {arm: [] for arm in arms}
    by_concept: list[tuple[str, dict[str, float], str]] = []
    routes: dict[str, list[str]] = {"router": [], "router and refined": []}
    by_route: dict[str, list[tuple[str, float, float]]] = {arm: [] for arm in routes}
    seconds = dict.fromkeys(arms, 0.0)
    for name, prompt, shown, targets in concepts:
        rows: dict[str, list[list[float]]] = {arm: [] for arm in arms}
        note = ""
        for induction in range(arguments.inductions):
            start = induction * arguments.references
            references = [
                Reference(image, mask=mask_to_image(mask))
                for image, mask in shown[start : start + arguments.references]
            ]
            induced = {
                key: induce(model, processor, prompt, references, refine=key == "refined", seed=induction)
                for key in ("plain", "refined")
            }
            note = f"{' | '.join(induced['plain'].phrases)} ({induced['plain'].score:.2f})"
            images = [image for image, _ in targets]
            inputs = processor(images, prompt)
            with_references = processor(images, prompt, references)
            runs = {
                "words": (inputs, {"router": "sam_only"}),
                "full reasoning": (with_references, {"router": "full_reasoning"}),
                "rule": (
                    with_references,
                    {"router": "full_reasoning", "rule": induced["plain"].rule or prompt},
                ),
                "concept": (inputs, {"router": "sam_only", "concept": induced["plain"]}),
                "concept and refined": (inputs, {"router": "sam_only", "concept": induced["refined"]}),
                "router": (with_references, {"concept": induced["plain"]}),
                "router and refined": (with_references, {"concept": induced["refined"]}),
            }
            for arm, (given, options) in runs.items():
                began = time.process_time()
                results = model.segment(given, processor=processor, generation_config=GREEDY, **options)
                seconds[arm] += time.process_time() - began
                rows[arm].append(
                    [
                        foreground_iou(np.asarray(result.mask) > 0, mask)
                        for result, (_, mask) in zip(results, targets)
                    ]
                )
                if arm in routes:
                    routes[arm] += [result.route for result in results]
                    reasoned = rows["full reasoning"][-1]
                    by_route[arm] += [
                        (result.route, iou, other)
                        for result, iou, other in zip(results, rows[arm][-1], reasoned, strict=True)
                    ]
        means = {arm: np.mean(each, axis=0) for arm, each in rows.items()}
        for arm in arms:
            values[arm] += means[arm].tolist()
        by_concept.append((name, {arm: float(means[arm].mean()) for arm in arms}, note))
        print(f"{name:28}", "  ".join(f"{arm} {means[arm].mean():.3f}" for arm in arms), note, flush=True)

    count = len(values["words"])
    print(
        f"\n{len(concepts)} concepts, {count} images, {arguments.inductions} inductions of {arguments.references}"
    )
    print("| arm | fg IoU | minus full reasoning | without the VLM (%) | CPU-s / image, of full reasoning |")
    print("|---|---|---|---|---|")
    for arm in arms:
        difference = resample(np.subtract(values[arm], values["full reasoning"]).tolist(), arm).interval()
        interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        share = f"{100 * np.mean([r == 'concept' for r in routes[arm]]):.1f}" if arm in routes else "-"
        cost = seconds[arm] / seconds["full reasoning"]
        print(f"| {arm} | {np.mean(values[arm]):.3f} | {interval} | {share} | {cost:.2f} |")
    for arm in ("router", "router and refined"):
        worst = min(by_concept, key=lambda row: row[1][arm] - row[1]["full reasoning"])
        print(f"{arm}: worst concept {worst[0]}, {worst[1][arm] - worst[1]['full reasoning']:+.3f}")
        for route in ("concept", "rule", "reasoning"):
            pairs = [(iou, other) for taken, iou, other in by_route[arm] if taken == route]
            if pairs:
                share = len(pairs) / len(by_route[arm])
                mean, reasoned = np.mean(pairs, axis=0)
                print(
                    f"  {route}: {100 * share:.1f} % of images, {mean:.3f}, reasoning on them {reasoned:.3f}"
                )


if __name__ == "__main__":
    main()
