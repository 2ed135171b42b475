"""Measure inference in CPU seconds of one thread, as ratios of paired runs.

    python benchmarks/shortcut.py [--repeats 15] [--images 256]

- shortcut: `segment(router="sam_only")` of one image, against a bare `Sam3Model` call on the same input. "with
  geometry token" is the call that gives the same masks (see sam_prompt.py). Also with the 72 x 72 patches of the
  released SAM 3.
- references: 16 images with the same references, in batches of 8, with and without sharing.
- one image: `segment` with SAM 3's first pass and reasoning, against the scheme of the released code: SAM 3 for the
  router, `generate`, a second full forward pass for the hidden states, and SAM 3 again.
- generation: completions with their hidden states, against `generate` of Transformers with the same settings.
- tiers: many images with the same four references, from `PIL.Image` to mask. The scheme of the released code for each
  image, against an induced concept ("concept"), a given rule ("rule") and full reasoning in batches of 8.
- wasted tokens: the fraction of the decoded tokens that belong to rows which had already ended.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from nano_sizes import PATCHES, load

from conceptseg_hf import Reference, ShortcutRouter
from conceptseg_hf import shared_references as sharing
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.induction import induce
from conceptseg_hf.inputs import PreparedSample
from conceptseg_hf.sam_prompt import decode, encode_text
from conceptseg_hf.vlm_families import get_family

GREEDY = {"max_new_tokens": 64}
DECLINES = ShortcutRouter(base=0.9999)  # a first pass that one-word prompts do not pass


def ratios(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median ratio of the CPU seconds of each action to those of the last one, measured alternately."""
    times: list[list[float]] = []
    for repeat in range(repeats + 1):
        row = []
        for action in actions:
            start = time.process_time()
            action()
            row.append(time.process_time() - start)
        if repeat:  # the first round warms up
            times.append(row)
    return [statistics.median(row[i] / row[-1] for row in times) for i in range(len(actions))]


class Bench:
    """The embedded checkpoint and samples for it."""

    def __init__(self, patches: int = PATCHES[0]) -> None:
        self.model, self.processor = load(patches)
        shapes = ConceptShapes("test")
        self.samples = [shapes[i] for i in range(24)]
        self.text = self.processor.sam_text(["shadow"])
        self.targets = [self.processor.prepare(s.image, "shadow", lazy=True) for s in self.samples[:4]]
        referenced = next(sample for sample in self.samples if len(sample.references) >= 2)
        self.prepared = [
            self.processor.prepare(s.image, "shadow", referenced.references) for s in self.samples[:16]
        ]

    def segment(self, samples: Sequence[PreparedSample], **options: object) -> None:
        """Segment samples with the processor, which post-processes them."""
        self.model.segment(samples, processor=self.processor, generation_config=GREEDY, **options)

    @torch.no_grad()
    def bare(self, sample: PreparedSample, geometry: bool) -> None:
        """SAM 3 alone; with a padding box it appends the geometry token."""
        ids, mask = self.text
        boxes = {"input_boxes": torch.zeros(1, 1, 4), "input_boxes_labels": torch.full((1, 1), -10)}
        self.model.sam(
            pixel_values=sample.sam_pixel_values[None],
            input_ids=ids,
            attention_mask=mask,
            **(boxes if geometry else {}),
        )

    @torch.no_grad()
    def released(self, sample: PreparedSample) -> None:
        """One image in the scheme of the released code."""
        self.bare(sample, geometry=True)
        model, processor = self.model, self.processor
        family = get_family(model.vlm.config)
        batch = processor.collate([sample])
        length = batch["input_ids"].shape[1]
        ids = model.vlm.generate(**batch, **GREEDY, do_sample=False)[0, length:]
        family.reset(model.vlm)
        completion = processor.tokenizer.decode(ids, skip_special_tokens=True)
        forced = processor.collate([sample], [completion])
        states = family.last_hidden_states(model.vlm, family.model_inputs(forced))
        concepts = model.translate_completion(states, forced["completion_mask"])
        answer = processor.decode_completion(ids, sample).answer or sample.prompt
        features = model.encode_image(sample.sam_pixel_values[None])
        text = encode_text(model.sam, *processor.sam_text([answer]))
        logits = decode(model.sam, features, *text, concepts).semantic_seg
        processor.post_process_mask(logits[0, 0], sample.coordinates)


def main() -> None:
    """Run all measurements and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", type=int, default=256, help="images of the tiers (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    measure_shortcut(bench, arguments.repeats, "16 x 16 patches")
    measure_shortcut(Bench(PATCHES[1]), max(3, arguments.repeats // 5), "72 x 72 patches")
    measure_references(bench, arguments.repeats)
    measure_one_image(bench, arguments.repeats)
    measure_generation(bench, arguments.repeats)
    measure_tiers(bench, arguments.images)
    measure_waste(bench, arguments.images)


def each(action: Callable[[PreparedSample], object], samples: Sequence[PreparedSample]) -> Callable:
    """Return an action that runs another one for each sample."""
    return lambda: [action(sample) for sample in samples]


def measure_shortcut(bench: Bench, repeats: int, name: str) -> None:
    """Compare the shortcut with bare calls of SAM 3."""

    def shortcut(sample: PreparedSample) -> None:
        bench.segment([sample], router="sam_only")

    for token, geometry in (("without", False), ("with", True)):

        def bare(sample: PreparedSample, geometry: bool = geometry) -> None:
            bench.bare(sample, geometry)

        ratio = ratios([each(shortcut, bench.targets), each(bare, bench.targets)], repeats)[0]
        print(f"shortcut, {name}, one image / bare Sam3Model {token} geometry token: {ratio:.2f}")


def measure_references(bench: Bench, repeats: int) -> None:
    """Compare batches that read shared references once with batches that do not."""
    from conceptseg_hf import generation

    def reason() -> None:
        for start in (0, 8):
            bench.segment(bench.prepared[start : start + 8], router="full_reasoning")

    def reason_in_scope() -> None:
        with bench.model.shared_references():
            reason()

    def reason_plain() -> None:
        read, generation.read_references = generation.read_references, lambda *arguments: None
        try:
            reason()
        finally:
            generation.read_references = read

    assert generation.read_references is sharing.read_references
    in_batch, in_scope, _ = ratios([reason, reason_in_scope, reason_plain], max(3, repeats // 5))
    print(f"16 images with the same references, shared in a batch / not shared: {in_batch:.2f}")
    print(f"16 images with the same references, shared by all batches / not shared: {in_scope:.2f}")


def measure_one_image(bench: Bench, repeats: int) -> None:
    """Compare one image with the scheme of the released code."""

    def one(sample: PreparedSample) -> None:
        bench.segment([sample], router=DECLINES)

    ratio = ratios([each(one, bench.prepared[:4]), each(bench.released, bench.prepared[:4])], repeats)[0]
    print(f"one image, segment / scheme of the released code: {ratio:.2f}")


def measure_generation(bench: Bench, repeats: int) -> None:
    """Compare the generation of completions with that of Transformers."""
    vlm, processor = bench.model.vlm, bench.processor

    def with_states(sample: PreparedSample) -> None:
        generate_with_states(vlm, processor.collate([sample]), GREEDY)

    @torch.no_grad()
    def plain(sample: PreparedSample) -> None:
        vlm.generate(**processor.collate([sample]), **GREEDY, do_sample=False)
        get_family(vlm.config).reset(vlm)

    ratio = ratios([each(with_states, bench.prepared[:4]), each(plain, bench.prepared[:4])], repeats)[0]
    print(f"one completion with hidden states / `generate`: {ratio:.2f}")


def measure_tiers(bench: Bench, num_images: int) -> None:
    """Compare the tiers with the scheme of the released code on images that share their references."""
    model, processor = bench.model, bench.processor
    shown = family_samples("val", 4)
    references = [Reference(sample.image, mask=sample.mask) for sample in shown]
    prompt = shown[0].prompt
    concept = induce(model, processor, prompt, references)
    rule = concept.rule or "the object that differs"
    samples = family_samples("test", num_images)
    totals = dict.fromkeys(("concept", "rule", "reasoning", "released"), 0.0)

    def add(name: str, action: Callable[[], object]) -> None:
        start = time.process_time()
        action()
        totals[name] += time.process_time() - start

    def with_references(chunk: Sequence[ConceptSample]) -> list[PreparedSample]:
        return [processor.prepare(sample.image, prompt, references) for sample in chunk]

    with model.shared_references():
        for start in range(0, len(samples), 8):
            chunk = samples[start : start + 8]
            add(
                "concept",
                lambda chunk=chunk: bench.segment(
                    [processor.prepare(sample.image, prompt, lazy=True) for sample in chunk],
                    router="sam_only",
                    concept=concept,
                ),
            )
            add(
                "rule",
                lambda chunk=chunk: bench.segment(with_references(chunk), router="full_reasoning", rule=rule),
            )
            add(
                "reasoning",
                lambda chunk=chunk: bench.segment(with_references(chunk), router="full_reasoning"),
            )
            add("released", lambda chunk=chunk: [bench.released(item) for item in with_references(chunk)])
    for name in ("concept", "rule", "reasoning"):
        ratio = totals["released"] / totals[name]
        print(f"{len(samples)} images with the same references, released code / tier {name!r}: {ratio:.1f}")


def measure_waste(bench: Bench, num_images: int) -> None:
    """Count the tokens that batches of 8 different prompts decode after a row has ended."""
    shapes = ConceptShapes("test", length=num_images)
    decoded = wasted = 0
    for start in range(0, num_images, 8):
        prepared = [
            bench.processor.prepare(shapes[i].image, shapes[i].prompt, shapes[i].references)
            for i in range(start, min(start + 8, num_images))
        ]
        generated = generate_with_states(bench.model.vlm, bench.processor.collate(prepared), GREEDY)
        decoded += generated.mask.numel()
        wasted += int((~generated.mask).sum())
    print(f"tokens of batches of 8 decoded after the end of their row: {100 * wasted / decoded:.1f} %")


def family_samples(split: str, count: int, family: str = "anomaly") -> list[ConceptSample]:
    """Return the first samples of a family of a split."""
    shapes = ConceptShapes(split, length=24 * count)
    found = (shapes[i] for i in range(len(shapes)) if shapes.slot(i).family.__name__ == family)
    return [sample for _, sample in zip(range(count), found)]


if __name__ == "__main__":
    main()
