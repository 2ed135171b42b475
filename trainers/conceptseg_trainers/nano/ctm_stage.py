"""Stage "ctm": train the CTM to translate completions to concept tokens; all else is frozen (stage I of the paper).

If the CTM is always trained together with the text of the answer, the concept tokens Z stay uninformative, since the
text is sufficient. It is therefore trained in three phases:

1. reading: auxiliary heads predict the box and the look of the described object from Z, without SAM 3;
2. imitation: Z approximates the tokens of SAM 3's own box prompt, for the box in the completion;
3. segmenting: dice + focal (eq. 5) with Z and the complete answer, with Z and the noun of the answer, or with Z alone.

There are three kinds of completions: those of the VLM ("own", generated once and cached in the run folder), the ground
truth ("true"), and ground-truth completions for another object of the same scene ("other"), so that one image has
several masks. The target is always the object that the completion describes, even if the VLM chose another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from conceptseg_hf.boxes import Box, box_iou
from conceptseg_hf.completion import format_completion
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.data.concept_shapes.families import Task
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor, CoordinateFrame, PreparedSample
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.sam_prompt import BOX_TEXT, ImageFeatures, box_tokens, decode, encode_image, encode_text
from conceptseg_hf.vlm_backbone import last_hidden_states, model_inputs

from ..from_scratch.loop import mean, write_tensors
from ..from_scratch.masks import bounding_box, total
from ..from_scratch.sam_stage import images_to_pixels, logits_to_masks, mask_logits
from .dense import DENSE_CLASSES, look_classes
from .examples import answer_for
from .scenes import TaskMix

KINDS = ("own", "true", "other")
TEXTS = ("full", "noun", "none")

_FIRST_TASK = 900_000  # above the tasks of the other stages
_GENERATION_BATCH = 48
_MAX_TOKENS = 64
_PART = 480  # number of tasks per file of cached completions
_TARGET, _UNKNOWN = -1, -2  # special values of an object index


@dataclass(frozen=True)
class CtmSteps:
    """Number of steps of each phase."""

    reading: int = 700
    imitation: int = 700
    segmenting: int = 1600

    @property
    def total(self) -> int:
        """Number of steps of all phases."""
        return self.reading + self.imitation + self.segmenting


class CtmWithHeads(nn.Module):
    """The CTM with the auxiliary heads of the first phase."""

    def __init__(self, ctm: nn.Module, num_queries: int, width: int) -> None:
        super().__init__()
        self.ctm = ctm
        self.box = nn.Linear(num_queries * width, 4)
        self.look = nn.Linear(num_queries * width, sum(DENSE_CLASSES.values()))


class CtmStage:
    """Train the CTM.

    Args:
        model: The model with the VLM and SAM 3 of the previous stages and a new CTM.
        processor: The processor.
        run_dir: Folder of the cached completions.
        steps: Number of steps of each phase.
        tasks: Number of tasks of the training split.
        images: Number of images per step, with two completions each.
        name: Name of the stage.
        device: Device of the model.
        held_out: Number of samples of the split "val", and of its group "which one", per evaluation.
        seed: Random seed of weights and data.
    """

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        run_dir: Path,
        steps: CtmSteps | None = None,
        tasks: int = 9600,
        images: int = 16,
        name: str = "ctm",
        device: str = "cpu",
        held_out: int = 240,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        model.to(device)  # type: ignore[arg-type]  # the wrapper in Transformers has no signature
        self.model, self.processor = model.eval(), processor
        self.steps = steps or CtmSteps()
        self.images, self.name, self.device, self.seed = images, name, device, seed
        model.vlm.requires_grad_(False)
        config = model.config.ctm_config
        self.module = CtmWithHeads(model.ctm, config.num_queries, config.sam_hidden_size).to(device)
        self.mix = TaskMix()
        folder = run_dir / "completions"
        self.table = _table(self, folder / "train", _TaskSource.train(self.mix), tasks)
        self.held_out = {
            group: _table(self, folder / name, _TaskSource.val(groups), held_out)
            for group, name, groups in (("", "val", None), ("which one", "val_which_one", ["which one"]))
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step, which depends on its phase."""
        rng = np.random.default_rng([17, self.seed, step])
        if step < self.steps.reading:
            return self._reading_loss(rng)
        tasks = rng.integers(len(self.table["present"]), size=self.images)
        # Two completions of different kinds for each image.
        rows = np.repeat(tasks, 2)
        kinds = [
            self._usable(int(row), int(kind)) for row in tasks for kind in rng.permutation(len(KINDS))[:2]
        ]
        if step < self.steps.reading + self.steps.imitation:
            return self._imitation_loss(rows, kinds)
        texts = [TEXTS[int(rng.integers(len(TEXTS)))] for _ in rows]
        return self._segmentation_loss(rows, kinds, texts)

    def _reading_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(self.table["present"]), size=8 * self.images)
        kinds = rng.integers(len(KINDS), size=len(rows))
        flat = self._concepts(self.table, rows, kinds).flatten(1)
        boxes, classes = (
            self._gather(self.table, "box", rows, kinds),
            self._gather(self.table, "look", rows, kinds),
        )
        has_box, has_look = boxes[:, 2] > boxes[:, 0], classes[:, 0] > 0
        box_loss = (self.module.box(flat)[has_box] - boxes[has_box]).abs().mean()
        parts = self.module.look(flat)[has_look].split(list(DENSE_CLASSES.values()), dim=1)
        look_loss = total(
            nn.functional.cross_entropy(part, classes[has_look, i].long()) for i, part in enumerate(parts)
        )
        return 5 * box_loss + 0.5 * look_loss, {"box": box_loss.item(), "look": look_loss.item()}

    def _imitation_loss(self, rows: np.ndarray, kinds: list[int]) -> tuple[Tensor, dict[str, float]]:
        boxes = self._gather(self.table, "box", rows, kinds)
        has_box = boxes[:, 2] > boxes[:, 0]
        with torch.no_grad():
            features = self._encode([self._task(int(row)).scene.pixels for row in rows[::2]])
            features = features.select(torch.arange(len(rows), device=self.device) // 2)
            centers = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
            tokens, _ = box_tokens(self.model.sam, features.vision, centers[:, None])
            text = self.processor.sam_text([BOX_TEXT] * len(rows), self.device)
            embeds, mask = encode_text(self.model.sam, *text)
            words = embeds[:, : int(mask[0].sum())]
            count = self.model.config.ctm_config.num_queries
            # The token of the box comes first, so that a single concept token suffices; it is repeated as padding.
            box = tokens[:, :1]
            targets = torch.cat([box, words, box.expand(-1, count, -1)], dim=1)[:, :count]
        concepts = self._concepts(self.table, rows, kinds)
        loss = (concepts - targets)[has_box].square().mean() / targets.var()
        return loss, {"imitation": loss.item()}

    def _segmentation_loss(
        self, rows: np.ndarray, kinds: list[int], texts: list[str]
    ) -> tuple[Tensor, dict[str, float]]:
        tasks = [self._task(int(row)) for row in rows[::2]]
        with torch.no_grad():
            features = self._encode([task.scene.pixels for task in tasks])
            features = features.select(torch.arange(len(rows), device=self.device) // 2)
        concepts = self._concepts(self.table, rows, kinds)
        logits, presence = self._decode(self.table, features, rows, kinds, texts, concepts)
        objects = self._gather(self.table, "object", rows, kinds)
        masks = [
            tasks[i // 2].mask if index == _TARGET else tasks[i // 2].scene.objects[index].mask
            for i, index in enumerate(objects.tolist())
        ]
        ground_truth = torch.from_numpy(np.stack(masks)).to(self.device)
        _, dice, focal = segmentation_loss(logits, ground_truth)
        present = ground_truth.flatten(1).any(1).float()
        presence_loss = nn.functional.binary_cross_entropy_with_logits(presence[:, 0], present)
        loss = dice + 10 * focal + 0.25 * presence_loss
        return loss, {"dice": dice.item(), "focal": focal.item(), "presence": presence_loss.item()}

    def _usable(self, row: int, kind: int) -> int:
        """Return the kind, or "true" if it is not known which object the completion describes."""
        return KINDS.index("true") if self.table[f"{KINDS[kind]}_object"][row] == _UNKNOWN else kind

    def _task(self, row: int) -> Task:
        return self.mix.task(_FIRST_TASK + row)

    def _encode(self, images: list[np.ndarray]) -> ImageFeatures:
        return encode_image(self.model.sam, images_to_pixels(images, self.device), geometry_cls=False)

    def _gather(
        self, table: dict[str, Tensor], name: str, rows: np.ndarray, kinds: list[int] | np.ndarray
    ) -> Tensor:
        """Return the values of a column for rows of the given kinds; see `_table`."""
        values = [table[f"{KINDS[kind]}_{name}"][row] for kind, row in zip(kinds, rows, strict=True)]
        return torch.stack(values).to(self.device)

    def _concepts(self, table: dict[str, Tensor], rows: np.ndarray, kinds: list[int] | np.ndarray) -> Tensor:
        states, mask = self._gather(table, "states", rows, kinds), self._gather(table, "mask", rows, kinds)
        return self.model.encode_concepts(states.float(), mask.bool())

    def _decode(
        self,
        table: dict[str, Tensor],
        features: ImageFeatures,
        rows: np.ndarray,
        kinds: list[int],
        texts: list[str],
        concepts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits (B, 1, h, w) and presence logits (B, 1).

        Args:
            table: Table of completions; see `_table`.
            features: Features of the B images.
            rows: (B,) rows of the table.
            kinds: Kinds of the completions.
            texts: Which part of the answer is the text of each prompt, one of `TEXTS`.
            concepts: Concept tokens, or None to prompt with the text alone.
        """
        sam = self.model.sam
        embeds = mask = None
        if concepts is None or set(texts) != {"none"}:
            full, noun = (self._gather(table, name, rows, kinds) for name in ("text", "noun"))
            uses_noun = torch.tensor([text == "noun" for text in texts], device=self.device)
            ids = torch.where(uses_noun[:, None, None], noun, full)
            embeds, mask = encode_text(sam, ids[:, 0], ids[:, 1])
            mask = mask & torch.tensor([text != "none" for text in texts], device=self.device)[:, None]
        output = decode(sam, features, embeds, mask, concepts)
        presence_logits = output.presence_logits
        assert presence_logits is not None  # SAM 3 always returns them
        return mask_logits(output), presence_logits

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the completions of the VLM on the split "val" and its group "which one".

        Metrics: foreground IoU, by level or stratum, for prompts of Z alone, with the noun, and with the answer; for
        comparison, for the noun, the answer and the box without Z.
        """
        metrics: dict[str, list[float]] = {}
        for group, table in self.held_out.items():
            source = _TaskSource.val([group] if group else None)
            for start in range(0, len(table["present"]), 48):
                rows = np.arange(start, min(start + 48, len(table["present"])))
                tasks = [source.task(int(row)) for row in rows]
                self._evaluate_rows(table, rows, tasks, [source.label(int(row)) for row in rows], metrics)
        return {key: mean(values) for key, values in sorted(metrics.items())}

    def _evaluate_rows(
        self,
        table: dict[str, Tensor],
        rows: np.ndarray,
        tasks: list[Task],
        labels: list[str],
        metrics: dict[str, list[float]],
    ) -> None:
        """Add the foreground IoUs of rows to the metrics; the labels are parts of their names."""
        own = [KINDS.index("own")] * len(rows)
        pixels = images_to_pixels([task.scene.pixels for task in tasks], self.device)
        with_cls = encode_image(self.model.sam, pixels)
        without = ImageFeatures(with_cls.vision, None)
        concepts = self._concepts(table, rows, own)
        boxes = self._gather(table, "box", rows, own)
        centers = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        box_text = encode_text(self.model.sam, *self.processor.sam_text([BOX_TEXT] * len(rows), self.device))
        logits = {"box": mask_logits(decode(self.model.sam, with_cls, *box_text, boxes=centers[:, None]))}
        for name, text, features, z in (
            ("z", "none", without, concepts),
            ("z_noun", "noun", without, concepts),
            ("z_text", "full", without, concepts),
            ("noun", "noun", with_cls, None),
            ("text", "full", with_cls, None),
        ):
            logits[name], _ = self._decode(table, features, rows, own, [text] * len(rows), z)
        for name, values in logits.items():
            for mask, task, label in zip(logits_to_masks(values, SIDE), tasks, labels, strict=True):
                if task.mask.any():
                    metrics.setdefault(f"{name}_{label}", []).append(foreground_iou(mask, task.mask))


@dataclass(frozen=True)
class _TaskSource:
    """Tasks and samples by row number.

    Attributes:
        locate: Function that returns the benchmark of a row, and the index in it.
    """

    locate: Callable[[int], tuple[ConceptShapes, int]]

    @classmethod
    def train(cls, mix: TaskMix) -> _TaskSource:
        return cls(lambda row: mix.locate(_FIRST_TASK + row))

    @classmethod
    def val(cls, groups: list[str] | None) -> _TaskSource:
        split = ConceptShapes("val", size=SIDE, groups=groups)
        return cls(lambda row: (split, row))

    def task(self, row: int) -> Task:
        benchmark, index = self.locate(row)
        return benchmark.task(index)

    def sample(self, row: int) -> ConceptSample:
        benchmark, index = self.locate(row)
        return benchmark[index]

    def label(self, row: int) -> str:
        benchmark, index = self.locate(row)
        slot = benchmark.slot(index)
        return slot.stratum or slot.level


def _table(stage: CtmStage, folder: Path, source: _TaskSource, count: int) -> dict[str, Tensor]:
    """Create a table of the completions of N tasks, which is cached in files.

    Args:
        stage: The stage.
        folder: Folder of the files.
        source: The tasks.
        count: Number of tasks, N.

    Returns:
        `present` (N,), and for each kind in `KINDS`, e.g. `own_states`: `states` (N, T, C) and `mask` (N, T) of the
        completions, `text` and `noun` (N, 2, t), ids and mask for SAM 3, `box` (N, 4) in fractions of the side (0
        without a box), and of the described object `look` (N, 5), its classes or 0, and `object` (N,), its index in the
        scene, `_TARGET` or `_UNKNOWN`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Tensor]] = {}
    progress = progress_bar(count, "samples", f"{stage.name}: completions, {folder.name}", mininterval=5)
    for start in range(0, count, _PART):
        stop = min(start + _PART, count)
        path = folder / f"{start:06d}-{stop:06d}.safetensors"
        if not path.exists():
            write_tensors(path, _complete(stage, source, range(start, stop)))
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                parts.setdefault(name, []).append(file.get_tensor(name))
        progress.update(stop - start)
    progress.close()
    return {name: torch.cat(values) for name, values in parts.items()}


def _complete(stage: CtmStage, source: _TaskSource, indices: range) -> dict[str, Tensor]:
    """Return the rows of some tasks; see `_table`."""
    rows: dict[str, list[Tensor]] = {}
    for start in range(indices.start, indices.stop, _GENERATION_BATCH):
        chunk = range(start, min(start + _GENERATION_BATCH, indices.stop))
        samples, tasks = [source.sample(i) for i in chunk], [source.task(i) for i in chunk]
        prepared = [
            stage.processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples
        ]
        rows.setdefault("present", []).append(torch.tensor([sample.present for sample in samples]))
        generated = generate_with_states(
            stage.model.vlm,
            stage.processor.collate(prepared, device=stage.device),
            {"max_new_tokens": _MAX_TOKENS},
        )
        own = [
            stage.processor.decode_completion(ids[mask], item)
            for ids, mask, item in zip(generated.token_ids, generated.mask, prepared, strict=True)
        ]
        _append(
            rows,
            "own",
            generated.hidden_states,
            generated.mask,
            stage.processor,
            [completion.answer or sample.prompt for completion, sample in zip(own, samples, strict=True)],
            [completion.bbox for completion in own],
            [
                _DescribedObject.by_box(task, item.coordinates, completion.bbox)
                for task, item, completion in zip(tasks, prepared, own, strict=True)
            ],
        )
        rng = np.random.default_rng([23, stage.seed, start])
        for kind in ("true", "other"):
            described = [
                _DescribedObject.of_target(task) if kind == "true" else _DescribedObject.of_another(rng, task)
                for task in tasks
            ]
            texts = [
                item.completion(task, sample, stage.processor.coordinate_scale)
                for item, task, sample in zip(described, tasks, prepared, strict=True)
            ]
            states, mask = _teacher_forced(stage, prepared, texts)
            _append(
                rows,
                kind,
                states,
                mask,
                stage.processor,
                [item.answer for item in described],
                [item.box(sample) for item, sample in zip(described, prepared, strict=True)],
                described,
            )
    return {name: torch.cat(values).contiguous() for name, values in rows.items()}


@dataclass(frozen=True)
class _DescribedObject:
    """The object that a completion describes.

    Attributes:
        mask: Its mask, (S, S) bool.
        answer: The answer of the completion; empty for completions of the VLM.
        look: Classes of its look (see `look_classes`), or None if they are not known.
        index: Its index in the scene, `_TARGET` or `_UNKNOWN`.
    """

    mask: np.ndarray
    answer: str
    look: tuple[int, ...] | None
    index: int

    @classmethod
    def of_target(cls, task: Task) -> _DescribedObject:
        """Return the target of a task."""
        index = next(
            (i for i, item in enumerate(task.scene.objects) if np.array_equal(item.mask, task.mask)), None
        )
        look = None if index is None else look_classes(task.scene.objects[index].look)
        return cls(task.mask, task.answer, look, _TARGET)

    @classmethod
    def by_box(cls, task: Task, frame: CoordinateFrame, text_box: Box | None) -> _DescribedObject:
        """Return the object of a predicted box in text units: the target, another object, or `_UNKNOWN`."""
        unknown = cls(task.mask, "", None, _UNKNOWN)
        if not task.mask.any():
            return cls(task.mask, "", None, _TARGET)
        if text_box is None:
            return unknown
        box = frame.text_box_to_image(text_box)
        if box_iou(box, bounding_box(task.mask)) >= 0.3:
            return cls(task.mask, "", None, _TARGET)
        ious = [box_iou(box, item.box) if item.box else 0.0 for item in task.scene.objects]
        best = int(np.argmax(ious))
        return cls(task.scene.objects[best].mask, "", None, best) if ious[best] >= 0.5 else unknown

    @classmethod
    def of_another(cls, rng: np.random.Generator, task: Task) -> _DescribedObject:
        """Draw another visible object of the scene; the target if there is none."""
        others = [
            i
            for i, item in enumerate(task.scene.objects)
            if item.mask.any() and not np.array_equal(item.mask, task.mask)
        ]
        if not others:
            return cls.of_target(task)
        index = others[int(rng.integers(len(others)))]
        item = task.scene.objects[index]
        return cls(item.mask, answer_for(task, item.look), look_classes(item.look), index)

    def box(self, sample: PreparedSample) -> Box | None:
        """Return its box in text units; None if the mask is empty."""
        return sample.coordinates.image_box_to_text(bounding_box(self.mask)) if self.mask.any() else None

    def completion(self, task: Task, sample: PreparedSample, scale: float) -> str:
        """Return the completion that describes it, with the rule and the check of the task."""
        think = task.think.removesuffix(task.answer) + self.answer
        check = sample.coordinates.check_box
        return format_completion(think, task.rule, check, self.box(sample), self.answer, scale)


def _teacher_forced(
    stage: CtmStage, prepared: list[PreparedSample], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of given completions at their tokens, (B, T, C), and their mask (B, T)."""
    batch = stage.processor.collate(prepared, completions, device=stage.device)
    with torch.no_grad():
        states = last_hidden_states(stage.model.vlm, model_inputs(batch))
    # Prompts are padded on the left, so all completions start in the same column.
    first = int(batch["completion_mask"].any(0).nonzero()[0])
    return states[:, first:], batch["completion_mask"][:, first:]


def _append(
    rows: dict[str, list[Tensor]],
    kind: str,
    states: Tensor,
    mask: Tensor,
    processor: ConceptSegProcessor,
    answers: Sequence[str],
    boxes: Sequence[Box | None],
    described: Sequence[_DescribedObject],
) -> None:
    """Append completions of one kind to the columns of a table; see `_table`."""
    states, mask = states[:, :_MAX_TOKENS], mask[:, :_MAX_TOKENS]
    padding = _MAX_TOKENS - states.shape[1]
    states = nn.functional.pad(states.masked_fill(~mask.bool()[..., None], 0), (0, 0, 0, padding))
    scale = processor.coordinate_scale
    nouns = [answer.split()[-1] for answer in answers]
    columns = {
        "states": states.half(),
        "mask": nn.functional.pad(mask.to(torch.uint8), (0, padding)),
        "text": torch.stack(processor.sam_text(answers), dim=1),
        "noun": torch.stack(processor.sam_text(nouns), dim=1),
        "box": torch.tensor([[value / scale for value in box or (0,) * 4] for box in boxes]),
        "look": torch.tensor([item.look or (0,) * len(DENSE_CLASSES) for item in described]),
        "object": torch.tensor([item.index for item in described]),
    }
    for name, values in columns.items():
        rows.setdefault(f"{kind}_{name}", []).append(values.cpu())
