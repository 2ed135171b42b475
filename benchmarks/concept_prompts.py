"""Measures induced concepts against full reasoning on every image.

    python benchmarks/concept_prompts.py                    # 24 concepts, 14 images each, two inductions
    python benchmarks/concept_prompts.py --development      # 25 other concepts, for choosing settings
    python benchmarks/concept_prompts.py --photos ../shared/data/photos

Concepts: the six CD families of ConceptShapes, and 18 attribute rules of its hidden-rule grammar (color, shape, texture
and pairs of these). The references of a concept are drawn from the split "val", its images from the split "test"; the
scenes of a rule are drawn with separate seeds. All arms segment the same images. Differences are paired
by image, after the mean over inductions. The development concepts have other rules, seeds and samples, and their images
of the CD families are from the split "val", too. With `--photos`, the concepts are the classes of CI and CD of the
benchmark "photos" that have enough samples; references are drawn from its split "train", images from "test".
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from conceptseg_hf import ConceptPrompt, ConceptSegForSegmentation, ConceptSegProcessor, Reference
from conceptseg_hf.data import ConceptShapes, load_benchmark
from conceptseg_hf.data.concept_shapes.families.hidden_rule import PROMPT, Rule, rule_scene
from conceptseg_hf.data.concept_shapes.rendering import COLORS, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import HELD_OUT_PAIRS
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.images import mask_to_image
from conceptseg_hf.induction import induce
from conceptseg_hf.inputs import ConceptSegInputs
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.rules import mask_ious

FAMILIES = ("camouflage", "shadow", "transparent", "anomaly", "lesion", "saliency")
GREEDY = {"max_new_tokens": 64}
SIZE = 128
WORDS, REASONING, RULE, CONCEPT = "words", "full reasoning", "rule", "concept"
CONCEPT_REFINED, ROUTER, ROUTER_REFINED = "concept and refined", "router", "router and refined"
ARMS = (WORDS, REASONING, RULE, CONCEPT, CONCEPT_REFINED, ROUTER, ROUTER_REFINED)
Example = tuple[Image.Image, np.ndarray]


@dataclass(frozen=True)
class Concept:
    """A concept with a prompt, examples for references, and images.

    Attributes:
        name: Its name in the tables.
        prompt: The user's prompt.
        shown: Examples for the references of all inductions.
        targets: Images and their masks.
    """

    name: str
    prompt: str
    shown: Sequence[Example]
    targets: Sequence[Example]


@dataclass(frozen=True)
class Run:
    """An arm on the images of a concept, after one induction.

    Attributes:
        ious: Foreground IoU of each image.
        routes: Route of each image.
        seconds: CPU seconds.
    """

    ious: tuple[float, ...]
    routes: tuple[str, ...]
    seconds: float


def rules() -> list[Rule]:
    """Six rules of one color, shape or texture each, and six pairs of color and shape."""
    colors, shapes, textures = list(COLORS), list(SHAPES), list(TEXTURES[1:])
    single = [
        Rule(((kind, word),)) for kind, words in (("color", colors), ("shape", shapes)) for word in words[:5]
    ]
    single += [Rule((("texture", word),)) for word in textures[:2]]
    pairs = [(c, s) for c, s in zip(colors[:8], shapes[:8]) if (c, s) not in HELD_OUT_PAIRS]
    return [*single, *(Rule((("color", c), ("shape", s))) for c, s in pairs[:6])]


def development_rules() -> list[Rule]:
    """Rules that are not in `rules`: of one attribute, and pairs with colors, shapes and textures."""
    colors, shapes, textures = list(COLORS), list(SHAPES), list(TEXTURES[1:])
    single = [
        Rule(((kind, word),)) for kind, words in (("color", colors), ("shape", shapes)) for word in words[5:]
    ]
    single += [Rule((("texture", word),)) for word in textures[2:]]
    pairs = [(c, shapes[(i + 3) % len(shapes)]) for i, c in enumerate(colors)]
    found = [Rule((("color", c), ("shape", s))) for c, s in pairs if (c, s) not in HELD_OUT_PAIRS]
    textured = [("striped", "color", "red"), ("dotted", "color", "cyan"), ("checked", "color", "yellow")]
    textured += [("dotted", "shape", "square"), ("checked", "shape", "ring"), ("striped", "shape", "star")]
    return [*single, *found[:6], *(Rule((("texture", t), (kind, word))) for t, kind, word in textured)]


def rule_examples(rule: Rule, number: int, count: int, stream: int, seed: int = 991) -> list[Example]:
    """Scenes in which exactly one object satisfies a rule."""
    rng = np.random.default_rng([seed, number, stream])
    scenes = [rule_scene(rng, SIZE, rule)[0] for _ in range(count)]
    return [(Image.fromarray(scene.pixels), scene.objects[0].mask) for scene in scenes]


def family_examples(family: str, split: str, count: int, start: int = 0) -> tuple[str, list[Example]]:
    """The prompt of a CD family and some of its samples."""
    samples = ConceptShapes(split, size=SIZE)
    slots = range(24 * (start + count))
    found = [samples[i] for i in slots if samples.slot(i).family.__name__ == family][start : start + count]
    return found[0].prompt, [(sample.image, np.asarray(sample.mask) > 0) for sample in found]


def load_concepts(images: int, shown: int, development: bool) -> list[Concept]:
    """The concepts, each with a number of images and of examples for references."""
    concepts = []
    for family in FAMILIES:
        if development:
            # The first samples are references of the other concepts.
            prompt, examples = family_examples(family, "val", shown + images, start=shown)
            concepts.append(Concept(family, prompt, examples[:shown], examples[shown:]))
        else:
            prompt, examples = family_examples(family, "val", shown)
            concepts.append(Concept(family, prompt, examples, family_examples(family, "test", images)[1]))
    seed = 992 if development else 991
    for number, rule in enumerate(development_rules() if development else rules()):
        references, targets = (
            rule_examples(rule, number, count, stream, seed) for stream, count in enumerate((shown, images))
        )
        concepts.append(Concept(rule.phrase, PROMPT, references, targets))
    return concepts


def photo_concepts(root: str, images: int, shown: int) -> list[Concept]:
    """The classes of CI and CD of the benchmark "photos" that have enough samples, which are drawn at random."""
    examples: dict[str, dict[str, list[Example]]] = defaultdict(dict)
    prompts = {}
    for split, count in (("train", shown), ("test", images)):
        samples = load_benchmark("photos", root, split)
        rows = defaultdict(list)
        for row, item in enumerate(samples.items):
            if item.level != "CR":
                rows[item.concept].append(row)
                prompts[item.concept] = item.prompt
        for concept, found in rows.items():
            drawn = np.random.default_rng(0).permutation(found)[:count].tolist()
            if len(drawn) == count:
                chosen = [samples[row] for row in drawn]
                examples[concept][split] = [(each.image, np.asarray(each.mask) > 0) for each in chosen]
    return [
        Concept(name, prompts[name], found["train"], found["test"])
        for name, found in sorted(examples.items())
        if len(found) == 2
    ]


def run_arms(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    concept: Concept,
    induction: int,
    num_references: int,
    arms: Sequence[str] = ARMS,
) -> tuple[dict[str, Run], ConceptPrompt]:
    """Induce a concept and run the arms on its images; also returns the concept without refined tokens."""
    start = induction * num_references
    references = [
        Reference(image, mask=mask_to_image(mask))
        for image, mask in concept.shown[start : start + num_references]
    ]

    def induced(refine: bool) -> ConceptPrompt:
        return induce(model, processor, concept.prompt, references, refine=refine, seed=induction)

    plain = induced(refine=False)
    refined = induced(refine=True) if set(arms) & {CONCEPT_REFINED, ROUTER_REFINED} else plain
    images = [image for image, _ in concept.targets]
    alone = processor(images, concept.prompt)
    with_references = processor(images, concept.prompt, references)
    options: dict[str, tuple[ConceptSegInputs, dict[str, Any]]] = {
        WORDS: (alone, {"router": "sam_only"}),
        REASONING: (with_references, {"router": "full_reasoning"}),
        RULE: (with_references, {"router": "full_reasoning", "rule": plain.rule or concept.prompt}),
        CONCEPT: (alone, {"router": "sam_only", "concept": plain}),
        CONCEPT_REFINED: (alone, {"router": "sam_only", "concept": refined}),
        ROUTER: (with_references, {"concept": plain}),
        ROUTER_REFINED: (with_references, {"concept": refined}),
    }
    runs = {}
    for arm in arms:
        inputs, arguments = options[arm]
        began = time.process_time()
        results = model.segment(inputs, processor=processor, generation_config=GREEDY, **arguments)
        seconds = time.process_time() - began
        ious = mask_ious(results, [mask for _, mask in concept.targets])
        runs[arm] = Run(ious, tuple(result.route for result in results), seconds)
    return runs, plain


def print_tables(results: Mapping[str, Sequence[Mapping[str, Run]]]) -> None:
    """Print the tables of all concepts; each has the runs of its inductions."""
    arms = list(next(iter(results.values()))[0])
    means = {
        arm: {name: np.mean([run[arm].ious for run in runs], axis=0) for name, runs in results.items()}
        for arm in arms
    }
    values = {arm: np.concatenate(list(each.values())) for arm, each in means.items()}
    every = {arm: [run[arm] for runs in results.values() for run in runs] for arm in arms}
    seconds = {arm: sum(run.seconds for run in runs) for arm, runs in every.items()}
    print(f"\n{len(results)} concepts, {len(values[REASONING])} images, {len(every[REASONING])} inductions")
    print("| arm | fg IoU | minus full reasoning | without the VLM (%) | CPU-s / image, of full reasoning |")
    print("|---|---|---|---|---|")
    for arm in arms:
        difference = resample((values[arm] - values[REASONING]).tolist(), arm)
        interval = interval_text(difference.interval(), 3, signed=True)
        routes = [route for run in every[arm] for route in run.routes]
        share = f"{100 * np.mean([route in ('concept', 'shortcut') for route in routes]):.1f}"
        cost = seconds[arm] / seconds[REASONING]
        print(f"| {arm} | {values[arm].mean():.3f} | {interval} | {share} | {cost:.2f} |")
    if CONCEPT in arms:
        best = [
            max(np.mean(run[arm].ious) for arm in (CONCEPT, REASONING))
            for runs in results.values()
            for run in runs
        ]
        print(f"the better of concept and reasoning for each induction: {np.mean(best):.3f}")
    for arm in (arm for arm in arms if arm in (ROUTER, ROUTER_REFINED)):
        losses = {name: each.mean() - means[REASONING][name].mean() for name, each in means[arm].items()}
        for name in sorted(losses, key=losses.__getitem__)[:4]:
            print(f"{arm}: worst concepts: {name}, {losses[name]:+.3f}")
        pairs = [
            (route, iou, other)
            for run, reasoned in zip(every[arm], every[REASONING], strict=True)
            for route, iou, other in zip(run.routes, run.ious, reasoned.ious, strict=True)
        ]
        for route in ("concept", "rule", "reasoning"):
            taken = [pair[1:] for pair in pairs if pair[0] == route]
            if taken:
                mean, other_mean = np.mean(taken, axis=0)
                share = 100 * len(taken) / len(pairs)
                print(f"  {route}: {share:.1f} % of images, {mean:.3f}, reasoning on them {other_mean:.3f}")


def main() -> None:
    """Runs all arms and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="embedded checkpoint, folder or hub id (default: nano)")
    parser.add_argument("--images", type=int, default=14, help="images per concept")
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--inductions", type=int, default=2)
    parser.add_argument("--concepts", type=int, help="only the first N concepts")
    parser.add_argument("--development", action="store_true", help="other concepts, for choosing settings")
    parser.add_argument("--photos", metavar="ROOT", help="folder of the benchmark photos, for its concepts")
    parser.add_argument("--unrefined", action="store_true", help="without the arms with refined tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(arguments.model, "cpu")
    arms = [arm for arm in ARMS if not (arguments.unrefined and arm in (CONCEPT_REFINED, ROUTER_REFINED))]
    shown = arguments.references * arguments.inductions
    if arguments.photos:
        concepts = photo_concepts(arguments.photos, arguments.images, shown)
    else:
        concepts = load_concepts(arguments.images, shown, arguments.development)
    results: dict[str, list[dict[str, Run]]] = {}
    for concept in concepts[: arguments.concepts]:
        for induction in range(arguments.inductions):
            runs, induced = run_arms(model, processor, concept, induction, arguments.references, arms)
            results.setdefault(concept.name, []).append(runs)
            ious = "  ".join(f"{arm} {np.mean(run.ious):.3f}" for arm, run in runs.items())
            print(f"{concept.name:22} {ious} {' | '.join(induced.phrases)} ({induced.score:.2f})", flush=True)
    print_tables(results)


if __name__ == "__main__":
    main()
