"""Measure the shortcut, shared references and one image in CPU seconds of one thread, as ratios of paired runs.

    python benchmarks/shortcut.py [--repeats 15]

- shortcut: `segment(router="sam_only")` of one image, against a bare `Sam3Model` call on the same input. "with
  geometry token" is the call that gives the same masks (see sam_prompt.py).
- references: 16 images with the same references, in batches of 8, with and without sharing.
- one image: `segment` with SAM 3's first pass and reasoning, against the scheme of the released code: SAM 3 for the
  router, `generate`, a second full forward pass for the hidden states, and SAM 3 again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, ShortcutRouter, nano_checkpoint
from conceptseg_hf import shared_references as sharing
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.inputs import PreparedSample
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

    def __init__(self) -> None:
        path = nano_checkpoint()
        self.model = ConceptSegForSegmentation.from_pretrained(path)
        self.processor = ConceptSegProcessor.from_pretrained(path)
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
        self.segment([sample], router="sam_only")
        model, processor = self.model, self.processor
        family = get_family(model.vlm.config)
        batch = processor.collate([sample])
        length = batch["input_ids"].shape[1]
        ids = model.vlm.generate(**batch, **GREEDY, do_sample=False)[0, length:]
        family.reset(model.vlm)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        forced = processor.collate([sample], [text])
        states = family.last_hidden_states(model.vlm, family.model_inputs(forced))
        concepts = model.translate_completion(states, forced["completion_mask"])
        answer = processor.decode_completion(ids, sample).answer or sample.prompt
        features = model.encode_image(sample.sam_pixel_values[None])
        logits, _ = model.decode_masks(features, *processor.sam_text([answer]), concepts)
        processor.post_process_mask(logits[0, 0], sample.coordinates)


def main() -> None:
    """Run all measurements and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    bench = Bench()

    def each(action: Callable[[PreparedSample], object], samples: Sequence[PreparedSample]) -> Callable:
        return lambda: [action(sample) for sample in samples]

    def shortcut(sample: PreparedSample) -> None:
        bench.segment([sample], router="sam_only")

    for name, geometry in (("without", False), ("with", True)):

        def bare(sample: PreparedSample, geometry: bool = geometry) -> None:
            bench.bare(sample, geometry)

        ratio = ratios([each(shortcut, bench.targets), each(bare, bench.targets)], repeats)[0]
        print(f"shortcut, one image / bare Sam3Model {name} geometry token: {ratio:.2f}")

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

    from conceptseg_hf import generation

    assert generation.read_references is sharing.read_references
    in_batch, in_scope, _ = ratios([reason, reason_in_scope, reason_plain], max(3, repeats // 5))
    print(f"16 images with the same references, shared in a batch / not shared: {in_batch:.2f}")
    print(f"16 images with the same references, shared by all batches / not shared: {in_scope:.2f}")

    def one(sample: PreparedSample) -> None:
        bench.segment([sample], router=DECLINES)

    ratio = ratios([each(one, bench.prepared[:4]), each(bench.released, bench.prepared[:4])], repeats)[0]
    print(f"one image, segment / scheme of the released code: {ratio:.2f}")


if __name__ == "__main__":
    main()
