"""Completions that the CTM is trained on, with their hidden states, in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from conceptseg_hf.boxes import Box, box_iou
from conceptseg_hf.completion import Completion, format_completion
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.hashing import weights_hash
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor, CoordinateFrame, PreparedSample
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.references import Reference
from conceptseg_hf.vlm_families import get_family

from .loop import write_tensors
from .masks import bounding_box

KINDS = ("own", "true", "other")
TARGET, UNKNOWN = -1, -2
"""Special values of the index of a described object."""

_GENERATION_BATCH = 48
_MAX_TOKENS = 64
_PART = 480  # number of tasks per file
_FORMAT = "2"  # version of the columns


@dataclass(frozen=True)
class TaskObject:
    """An object of a target image.

    Attributes:
        mask: (S, S) bool.
        answer: The answer that describes it.
        classes: Class indices of its look; see `CtmTask.classes`.
    """

    mask: np.ndarray
    answer: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class CtmTask:
    """A task with its ground truth.

    Attributes:
        pixels: (S, S, 3) uint8, the target image.
        mask: (S, S) bool, what is to be segmented; empty if it is absent.
        prompt: The prompt.
        references: The references.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Ground-truth answer.
        classes: Class indices of the look of the target, one for each auxiliary classification (0 if there is none), or
            None if they are not known.
        objects: Objects of the image, which may include the target.
        label: Name of the task's metrics.
    """

    pixels: np.ndarray
    mask: np.ndarray
    prompt: str
    references: tuple[Reference, ...]
    think: str
    rule: str
    answer: str
    classes: tuple[int, ...] | None
    objects: tuple[TaskObject, ...]
    label: str = ""


class CompletionWriter:
    """Generates and reads completions.

    Args:
        model: The model.
        processor: The processor.
        noun: Function that returns the noun of an answer.
        num_classes: Number of auxiliary classifications.
        name: Name of the stage, for the progress bar.
        device: Device of the model.
        seed: Random seed.
    """

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        noun: Callable[[str], str],
        num_classes: int,
        name: str,
        device: str,
        seed: int,
    ) -> None:
        self.model, self.processor, self.noun, self.num_classes = model, processor, noun, num_classes
        self.name, self.device, self.seed = name, device, seed
        self.metadata = {"format": _FORMAT, "vlm": weights_hash({"vlm": model.vlm})}

    def table(self, folder: Path, source: Callable[[int], CtmTask], count: int) -> dict[str, Tensor]:
        """Create a table of the completions of N tasks, which is cached in files.

        Args:
            folder: Folder of the files.
            source: Function that returns the task of a row.
            count: Number of tasks, N.

        Returns:
            `present` (N,), and for each kind in `KINDS`, e.g. `own_states`: `states` (N, T, C) and `mask` (N, T) of the
            completions, `text` and `noun` (N, 2, t), ids and mask for SAM 3, `box` (N, 4) in fractions of the side (0
            without a box), and of the described object `look` (N, C), its classes or 0, `object` (N,), its index in
            the scene, `TARGET` or `UNKNOWN`, and `named` (N,), whether the answer singles it out.

        Raises:
            ValueError: If a file contains completions of another VLM, or other columns.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[Tensor]] = {}
        progress = progress_bar(count, "samples", f"{self.name}: completions, {folder.name}", mininterval=5)
        for start in range(0, count, _PART):
            stop = min(start + _PART, count)
            path = folder / f"{start:06d}-{stop:06d}.safetensors"
            if not path.exists():
                write_tensors(path, self._complete(source, range(start, stop)), self.metadata)
            with safe_open(path, "pt") as file:
                if file.metadata() != self.metadata:
                    raise ValueError(
                        f"{str(path)!r} contains completions of another VLM or of another version of the code; delete "
                        f"the folder {str(folder)!r} to generate them again."
                    )
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    parts.setdefault(name, []).append(file.get_tensor(name))
            progress.update(stop - start)
        progress.close()
        return {name: torch.cat(values) for name, values in parts.items()}

    def _complete(self, source: Callable[[int], CtmTask], indices: range) -> dict[str, Tensor]:
        """Return the rows of some tasks; see `table`."""
        rows: dict[str, list[Tensor]] = {}
        for start in range(indices.start, indices.stop, _GENERATION_BATCH):
            chunk = range(start, min(start + _GENERATION_BATCH, indices.stop))
            tasks = [source(i) for i in chunk]
            prepared = [
                self.processor.prepare(Image.fromarray(task.pixels), task.prompt, task.references)
                for task in tasks
            ]
            rows.setdefault("present", []).append(torch.tensor([bool(task.mask.any()) for task in tasks]))
            generated = generate_with_states(
                self.model.vlm,
                self.processor.collate(prepared, device=self.device),
                {"max_new_tokens": _MAX_TOKENS},
            )
            own = [
                self.processor.decode_completion(ids[mask], item)
                for ids, mask, item in zip(generated.token_ids, generated.mask, prepared, strict=True)
            ]
            self._append(
                rows,
                "own",
                generated.hidden_states,
                generated.mask,
                [completion.answer or task.prompt for completion, task in zip(own, tasks, strict=True)],
                [completion.bbox for completion in own],
                [
                    DescribedObject.of_completion(task, item.coordinates, completion)
                    for task, item, completion in zip(tasks, prepared, own, strict=True)
                ],
            )
            rng = np.random.default_rng([23, self.seed, start])
            for kind in ("true", "other"):
                described = [
                    DescribedObject.of_target(task)
                    if kind == "true"
                    else DescribedObject.of_another(rng, task)
                    for task in tasks
                ]
                texts = [
                    item.completion(task, sample, self.processor.coordinate_scale)
                    for item, task, sample in zip(described, tasks, prepared, strict=True)
                ]
                states, mask = self._teacher_forced(prepared, texts)
                self._append(
                    rows,
                    kind,
                    states,
                    mask,
                    [item.answer for item in described],
                    [item.box(sample) for item, sample in zip(described, prepared, strict=True)],
                    described,
                )
        return {name: torch.cat(values).contiguous() for name, values in rows.items()}

    def _teacher_forced(
        self, prepared: list[PreparedSample], completions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states of given completions at their tokens, (B, T, C), and their mask (B, T)."""
        batch = self.processor.collate(prepared, completions, device=self.device)
        with torch.no_grad():
            family = get_family(self.model.vlm.config)
            states = family.last_hidden_states(self.model.vlm, family.model_inputs(batch))
        # Prompts are padded on the left, so all completions start in the same column.
        first = int(batch["completion_mask"].any(0).nonzero()[0])
        return states[:, first:], batch["completion_mask"][:, first:]

    def _append(
        self,
        rows: dict[str, list[Tensor]],
        kind: str,
        states: Tensor,
        mask: Tensor,
        answers: Sequence[str],
        boxes: Sequence[Box | None],
        described: Sequence[DescribedObject],
    ) -> None:
        """Append completions of one kind to the columns of a table; see `table`."""
        states, mask = states[:, :_MAX_TOKENS], mask[:, :_MAX_TOKENS]
        padding = _MAX_TOKENS - states.shape[1]
        states = nn.functional.pad(states.masked_fill(~mask.bool()[..., None], 0), (0, 0, 0, padding))
        scale = self.processor.coordinate_scale
        nouns = [self.noun(answer) for answer in answers]
        columns = {
            "states": states.half(),
            "mask": nn.functional.pad(mask.to(torch.uint8), (0, padding)),
            "text": torch.stack(self.processor.sam_text(answers), dim=1),
            "noun": torch.stack(self.processor.sam_text(nouns), dim=1),
            "box": torch.tensor([[value / scale for value in box or (0,) * 4] for box in boxes]),
            "look": torch.tensor([item.classes or (0,) * self.num_classes for item in described]),
            "object": torch.tensor([item.index for item in described]),
            "named": torch.tensor([item.is_named for item in described]),
        }
        for name, values in columns.items():
            rows.setdefault(f"{kind}_{name}", []).append(values.cpu())


@dataclass(frozen=True)
class DescribedObject:
    """The object that a completion describes.

    Attributes:
        mask: Its mask, (S, S) bool.
        answer: The answer of the completion; empty for completions of the VLM.
        classes: Classes of its look, or None if they are not known.
        index: Its index in the scene, `TARGET` or `UNKNOWN`.
        is_named: Whether the answer of the completion describes it, and no other object.
    """

    mask: np.ndarray
    answer: str
    classes: tuple[int, ...] | None
    index: int
    is_named: bool = False

    @classmethod
    def of_target(cls, task: CtmTask) -> DescribedObject:
        """Return the target of a task."""
        return cls(task.mask, task.answer, task.classes, TARGET, _singles_out(task, task.answer, task.mask))

    @classmethod
    def of_completion(cls, task: CtmTask, frame: CoordinateFrame, completion: Completion) -> DescribedObject:
        """Return the object that a completion of the VLM describes: the target, another object, or `UNKNOWN`.

        If the answer singles out the target, it is the target even if the box is wrong. Z is then trained to follow
        the words where they contradict the place; otherwise it would only know accurate boxes, and trust all of them.
        """
        target = cls.of_target(task)._as_written(completion.answer)
        unknown = cls(task.mask, "", None, UNKNOWN)
        if target.is_named or not task.mask.any():
            return target
        if completion.bbox is None:
            return unknown
        box = frame.text_box_to_image(completion.bbox)
        if box_iou(box, bounding_box(task.mask)) >= 0.3:
            return target
        ious = [box_iou(box, bounding_box(item.mask)) if item.mask.any() else 0.0 for item in task.objects]
        best = int(np.argmax(ious)) if ious else UNKNOWN
        if not ious or ious[best] < 0.5:
            return unknown
        return cls._of_object(task, best)._as_written(completion.answer)

    @classmethod
    def of_another(cls, rng: np.random.Generator, task: CtmTask) -> DescribedObject:
        """Draw another visible object of the scene; the target if there is none."""
        others = [
            i
            for i, item in enumerate(task.objects)
            if item.mask.any() and not np.array_equal(item.mask, task.mask)
        ]
        if not others:
            return cls.of_target(task)
        return cls._of_object(task, others[int(rng.integers(len(others)))])

    @classmethod
    def _of_object(cls, task: CtmTask, index: int) -> DescribedObject:
        item = task.objects[index]
        return cls(item.mask, item.answer, item.classes, index, _singles_out(task, item.answer, item.mask))

    def _as_written(self, answer: str | None) -> DescribedObject:
        """Return it as described by a completion of the VLM with the given answer."""
        return replace(self, answer="", classes=None, is_named=self.is_named and answer == self.answer)

    def box(self, sample: PreparedSample) -> Box | None:
        """Return its box in text units; None if the mask is empty."""
        return sample.coordinates.image_box_to_text(bounding_box(self.mask)) if self.mask.any() else None

    def completion(self, task: CtmTask, sample: PreparedSample, scale: float) -> str:
        """Return the completion that describes it, with the rule and the check of the task."""
        think = task.think.removesuffix(task.answer) + self.answer
        check = sample.coordinates.check_box
        return format_completion(think, task.rule, check, self.box(sample), self.answer, scale)


def _singles_out(task: CtmTask, answer: str, mask: np.ndarray) -> bool:
    """Whether the words of an answer describe no object of the scene outside a mask."""
    words = set(answer.split())
    return not any(
        words.issubset(item.answer.split()) and 2 * (item.mask & mask).sum() < item.mask.sum()
        for item in task.objects
    )
