"""Training examples of coprs-nano: completions with concentration tokens, and the mask of each token.

Perception examples name several objects, each with a concentration token after its name: several masks per image. A
task example is a complete task as in inference, with one token at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from conceptseg_hf.coprs.completion import REF_POS, format_reasoning
from conceptseg_hf.data.concept_shapes.families import Task
from conceptseg_hf.data.concept_shapes.scenes import Scene

from ..from_scratch.example_writer import BaseExampleWriter, Entry, TrainingImage
from ..from_scratch.vlm_examples import AttentionTarget, TrainingExample
from ..nano.examples import ExampleWriter, described_object, some_words

_MIN_PIXELS = 12  # size of the smallest objects in perception examples


@dataclass(frozen=True)
class PriorExample(TrainingExample):
    """A training sequence with concentration tokens; its last image is the target.

    Attributes:
        masks: (S, S) bool mask of each concentration token.
    """

    masks: tuple[np.ndarray, ...] = ()


class PriorWriter(BaseExampleWriter):
    """Writes concentration tokens where the examples of ConceptSeg have boxes."""

    max_entries = 4

    def location(self, entry: Entry, position: int) -> tuple[list[int], list[AttentionTarget]]:
        """Return the concentration token, whose mask is that of the entry, in the last image."""
        tokens = self.token_ids(REF_POS)
        # The query of an attention target is the token before the position.
        return tokens, [
            AttentionTarget(position + len(tokens), {entry.image: self.mask_to_tokens(entry.mask)})
        ]

    def finish_listing(self, example: TrainingExample, listed: Sequence[Entry]) -> PriorExample:
        """Return the example with the masks of its concentration tokens, and without dense targets."""
        values = {**vars(example), "dense": ()}
        return PriorExample(**values, masks=tuple(entry.mask for entry in listed))

    def reasoning_example(
        self,
        rng: np.random.Generator,
        images: Sequence[np.ndarray],
        instruction: str,
        think: str,
        answer: str,
        mask: np.ndarray,
    ) -> PriorExample:
        """Create an example of a complete task: the instruction, the reasoning, and the concentration token.

        Args:
            rng: Random generator.
            images: The images; the last one is the target.
            instruction: The instruction.
            think: The reasoning.
            answer: The last words of the reasoning, which are read from the image; may be empty.
            mask: (S, S) bool mask of the token.
        """
        completion = [*self.token_ids(format_reasoning(think)), self.ids["<|im_end|>"]]
        attention_targets: list[AttentionTarget] = []
        if mask.any():
            target = {len(images) - 1: self.mask_to_tokens(mask)}
            end = completion.index(self.ids["</think>"])
            length = len(self.token_ids(answer))
            attention_targets = [AttentionTarget(i, target) for i in range(end - length, end)]
            attention_targets.append(AttentionTarget(len(completion) - 1, target))
        return PriorExample(
            tuple(images),
            self.prompt_ids(instruction, len(images)),
            completion,
            self.with_noise(rng, completion),
            tuple(attention_targets),
            dense=(),
            masks=(mask,),
        )


class PriorExampleWriter(PriorWriter, ExampleWriter):
    """Convert scenes and tasks of ConceptShapes to examples with concentration tokens."""

    def positions(self, rng: np.random.Generator, scene: Scene, several: bool) -> PriorExample:
        """Name objects of a scene, each followed by the concentration token.

        Args:
            rng: Random generator.
            scene: The scene.
            several: Whether phrases may describe several objects, which share a mask; otherwise they are unique names.
        """
        masks: dict[str, np.ndarray] = {}
        for item in scene.objects:
            words = item.look.phrase.split()
            if several and not item.look.kind:
                words = some_words(rng, item.look)
            matching = [other for other in scene.objects if other.look.matches(words)]
            if several or len(matching) == 1:
                mask = np.any([other.mask for other in matching], axis=0)
                if mask.sum() >= _MIN_PIXELS:
                    masks[" ".join(words)] = mask
        example = self.listing(
            rng,
            "find objects" if several else "mark objects",
            [TrainingImage(scene.pixels, None)],
            [Entry(phrase, {} if several else {0: mask}, 0, mask) for phrase, mask in masks.items()],
            first_guided=1,  # the order is random, so the first word may be that of any object
            noise=not several,
        )
        return cast(PriorExample, example)

    def reasoning(
        self,
        rng: np.random.Generator,
        task: Task,
        chosen: int | None = None,
        with_reasoning: bool = True,
    ) -> PriorExample:
        """Create an example of a complete task.

        Args:
            rng: Random generator.
            task: The task.
            chosen: Index of an object of the target scene. If given, reasoning and mask are those of this object
                instead of the correct one.
            with_reasoning: Whether `<think>` contains the reasoning; otherwise it is empty.
        """
        mask, answer, think = described_object(task, chosen)
        images = [task.scene.pixels]
        if task.references:
            mosaic, _, frame = self.compose(task.references)
            instruction = self.processor.instruction(task.prompt, frame)
            images.insert(0, mosaic)
        else:
            instruction = self.processor.template.fill("no_reference", task.prompt)
        reasoning = (think, answer) if with_reasoning else ("", "")
        return self.reasoning_example(rng, images, instruction, *reasoning, mask)


def masks_of(examples: Sequence[PriorExample]) -> np.ndarray:
    """Return the masks of all concentration tokens, in the order of examples and tokens, (N, S, S) bool."""
    return np.stack([mask for example in examples for mask in example.masks])
