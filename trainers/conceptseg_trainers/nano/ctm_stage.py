"""Stage "ctm": the CTM learns to turn completions into concept tokens; the rest is frozen (stage I of the paper).

Trained always beside the answer's text, the concept tokens Z stay empty: the text is enough. Three phases make them
carry what the completion says:

1. reading: throw-away heads must read the box and the look of the described object from Z, without SAM 3;
2. imitation: Z becomes the tokens that SAM 3's own box prompt would be, for the box that the completion writes;
3. segmenting: dice + focal (eq. 5) with Z beside the whole answer, beside its noun alone, and on its own.

Completions are the policy's own (generated once, kept in the run folder), true ones, and true ones about another object
of the same scene, so that the same picture has several masks. A module that translates says what the completion says:
where the policy chose another object, that one is the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from conceptseg_hf.boxes import box_iou, mask_to_box
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

from .dense import DENSE_CLASSES, look_classes
from .loop import mean, write_tensors
from .sam_stage import scenes_to_pixels, to_masks
from .scenes import TaskMix

KINDS = ("own", "true", "other")
TEXTS = ("full", "noun", "none")

_FIRST_TASK = 900_000  # the other stages stay below
_GENERATION_BATCH = 48
_MAX_TOKENS = 64
_PART = 480
_TARGET, _UNKNOWN = -1, -2  # in the place of an object's index


@dataclass(frozen=True)
class CtmSteps:
    """Steps of the three phases."""

    reading: int = 700
    imitation: int = 700
    segmenting: int = 1600

    @property
    def total(self) -> int:
        """All of them."""
        return self.reading + self.imitation + self.segmenting


class CtmWithHeads(nn.Module):
    """The CTM, and the heads of its first phase."""

    def __init__(self, ctm: nn.Module, num_queries: int, width: int) -> None:
        super().__init__()
        self.ctm = ctm
        self.box = nn.Linear(num_queries * width, 4)
        self.look = nn.Linear(num_queries * width, sum(DENSE_CLASSES.values()))


class CtmStage:
    """Trains the CTM.

    Args:
        model: The VLM and SAM 3 of the earlier stages with a fresh CTM.
        processor: The nano processor.
        run_dir: Where completions are kept.
        steps: Steps of the phases.
        tasks: How many tasks of the training split are used, over and over.
        images: Images per step; each with two completions.
        name: Name of the stage.
        device: Where to train.
        held_out: Samples of the split "val" that an evaluation takes, and of "which one" as many.
        seed: Seed of the weights and of the batches.
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
        self.model, self.processor = model.to(device).eval(), processor
        self.steps = steps or CtmSteps()
        self.images, self.name, self.device, self.seed = images, name, device, seed
        model.vlm.requires_grad_(False)
        config = model.config.ctm_config
        self.module = CtmWithHeads(model.ctm, config.num_queries, config.sam_hidden_size).to(device)
        self.mix = TaskMix()
        folder = run_dir / "completions"
        self.table = _table(self, folder / "train", _Source.train(self.mix), tasks)
        self.held_out = {
            group: _table(self, folder / name, _Source.val(groups), held_out)
            for group, name, groups in (("", "val", None), ("which one", "val_which_one", ["which one"]))
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, by phase."""
        rng = np.random.default_rng([17, self.seed, step])
        if step < self.steps.reading:
            return self._reading_loss(rng)
        tasks = rng.integers(len(self.table["present"]), size=self.images)
        # Two completions of each image: one picture, several masks.
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
        look_loss = sum(
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
            # The box comes first, so that a single concept token is the box; further ones repeat it.
            box = tokens[:, :1]
            wanted = torch.cat([box, words, box.expand(-1, count, -1)], dim=1)[:, :count]
        concepts = self._concepts(self.table, rows, kinds)
        loss = (concepts - wanted)[has_box].square().mean() / wanted.var()
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
        total = dice + 10 * focal + 0.25 * presence_loss
        return total, {"dice": dice.item(), "focal": focal.item(), "presence": presence_loss.item()}

    def _usable(self, row: int, kind: int) -> int:
        """A kind of completion; the true one in the place of an own one that is about nothing in particular."""
        return KINDS.index("true") if self.table[f"{KINDS[kind]}_object"][row] == _UNKNOWN else kind

    def _task(self, row: int) -> Task:
        return self.mix.task(_FIRST_TASK + row)

    def _encode(self, pictures: list[np.ndarray]) -> ImageFeatures:
        pixels = scenes_to_pixels(pictures, self.device)
        return encode_image(self.model.sam, pixels, geometry_cls=False)

    def _gather(self, table: dict, name: str, rows: np.ndarray, kinds: list[int] | np.ndarray) -> Tensor:
        values = [table[f"{KINDS[kind]}_{name}"][row] for kind, row in zip(kinds, rows, strict=True)]
        return torch.stack(values).to(self.device)

    def _concepts(self, table: dict, rows: np.ndarray, kinds: list[int] | np.ndarray) -> Tensor:
        states, mask = self._gather(table, "states", rows, kinds), self._gather(table, "mask", rows, kinds)
        return self.model.encode_concepts(states.float(), mask.bool())

    def _decode(
        self,
        table: dict,
        features: ImageFeatures,
        rows: np.ndarray,
        kinds: list[int],
        texts: list[str],
        concepts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (B, 1, h, w) and presence logits (B, 1)."""
        sam = self.model.sam
        embeds = mask = None
        if concepts is None or set(texts) != {"none"}:
            full, noun = (self._gather(table, name, rows, kinds) for name in ("text", "noun"))
            uses_noun = torch.tensor([text == "noun" for text in texts], device=self.device)
            ids = torch.where(uses_noun[:, None, None], noun, full)
            embeds, mask = encode_text(sam, ids[:, 0], ids[:, 1])
            mask = mask & torch.tensor([text != "none" for text in texts], device=self.device)[:, None]
        output = decode(sam, features, embeds, mask, concepts)
        return output.semantic_seg, output.presence_logits

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Foreground IoU of own completions, on "val" by level and on "which one" by stratum.

        Prompts: Z alone, with the noun and with the answer; for comparison the text and the box alone.
        """
        numbers: dict[str, list[float]] = {}
        for group, table in self.held_out.items():
            source = _Source.val([group] if group else None)
            for start in range(0, len(table["present"]), 48):
                rows = np.arange(start, min(start + 48, len(table["present"])))
                tasks = [source.task(int(row)) for row in rows]
                self._evaluate_rows(table, rows, tasks, [source.label(int(row)) for row in rows], numbers)
        return {key: mean(values) for key, values in sorted(numbers.items())}

    def _evaluate_rows(
        self, table: dict, rows: np.ndarray, tasks: list[Task], labels: list[str], numbers: dict
    ) -> None:
        own = [KINDS.index("own")] * len(rows)
        pixels = scenes_to_pixels([task.scene.pixels for task in tasks], self.device)
        with_cls = encode_image(self.model.sam, pixels)
        without = ImageFeatures(with_cls.vision, None)
        concepts = self._concepts(table, rows, own)
        boxes = self._gather(table, "box", rows, own)
        centers = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        visual = encode_text(self.model.sam, *self.processor.sam_text([BOX_TEXT] * len(rows), self.device))
        logits = {"box": decode(self.model.sam, with_cls, *visual, boxes=centers[:, None]).semantic_seg}
        for name, text, features, z in (
            ("z", "none", without, concepts),
            ("z_noun", "noun", without, concepts),
            ("z_text", "full", without, concepts),
            ("noun", "noun", with_cls, None),
            ("text", "full", with_cls, None),
        ):
            logits[name], _ = self._decode(table, features, rows, own, [text] * len(rows), z)
        for name, values in logits.items():
            for mask, task, label in zip(to_masks(values), tasks, labels, strict=True):
                if task.mask.any():
                    numbers.setdefault(f"{name}_{label}", []).append(foreground_iou(mask, task.mask))


@dataclass(frozen=True)
class _Source:
    """Tasks by their number, and the samples they make."""

    mix: TaskMix | None
    split: ConceptShapes | None

    @classmethod
    def train(cls, mix: TaskMix) -> _Source:
        return cls(mix, None)

    @classmethod
    def val(cls, groups: list[str] | None) -> _Source:
        return cls(None, ConceptShapes("val", size=SIDE, groups=groups))

    def _place(self, row: int) -> tuple[ConceptShapes, int]:
        return (self.split, row) if self.mix is None else self.mix.place(_FIRST_TASK + row)

    def task(self, row: int) -> Task:
        source, index = self._place(row)
        return source.task(index)

    def sample(self, row: int) -> ConceptSample:
        source, index = self._place(row)
        return source[index]

    def label(self, row: int) -> str:
        source, index = self._place(row)
        slot = source.slot(index)
        return slot.stratum or slot.level


def _table(stage: CtmStage, folder: Path, source: _Source, count: int) -> dict[str, Tensor]:
    """What completions of tasks say; made in parts that are kept.

    Returns:
        `present` (N,), and of each of `KINDS`: `states` (N, T, C), `mask` (N, T), `text` and `noun` (N, 2, t) ids and
        mask for SAM 3, `box` (N, 4) as written, in fractions of the side, `look` (N, 5) classes or 0, `object` (N,).
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
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                parts.setdefault(name, []).append(file.get_tensor(name))
        progress.update(stop - start)
    progress.close()
    return {name: torch.cat(values) for name, values in parts.items()}


def _complete(stage: CtmStage, source: _Source, indices: range) -> dict[str, Tensor]:
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
        described = [_Described.of_target(task) for task in tasks]
        _append(
            rows,
            "own",
            generated.hidden_states,
            generated.mask,
            stage.processor,
            [completion.answer or sample.prompt for completion, sample in zip(own, samples, strict=True)],
            [completion.bbox for completion in own],
            [
                _Described.by_box(task, item.frame, completion.bbox, stage.processor)
                for task, item, completion in zip(tasks, prepared, own, strict=True)
            ],
        )
        rng = np.random.default_rng([23, stage.seed, start])
        for kind in ("true", "other"):
            if kind == "other":
                described = [_Described.of_another(rng, task) for task in tasks]
            texts = [
                item.completion(task, ready, stage.processor)
                for item, task, ready in zip(described, tasks, prepared, strict=True)
            ]
            states, mask = _teacher_forced(stage, prepared, texts)
            _append(
                rows,
                kind,
                states,
                mask,
                stage.processor,
                [item.answer for item in described],
                [item.box(ready, stage.processor) for item, ready in zip(described, prepared, strict=True)],
                described,
            )
    return {name: torch.cat(values).contiguous() for name, values in rows.items()}


@dataclass(frozen=True)
class _Described:
    """The object that a completion is about."""

    mask: np.ndarray
    answer: str
    look: tuple[int, ...] | None
    index: int

    @classmethod
    def of_target(cls, task: Task) -> _Described:
        index = next(
            (i for i, item in enumerate(task.scene.objects) if np.array_equal(item.mask, task.mask)), None
        )
        look = None if index is None else look_classes(task.scene.objects[index].look)
        return cls(task.mask, task.answer, look, _TARGET)

    @classmethod
    def by_box(
        cls, task: Task, frame: CoordinateFrame, box: tuple[float, ...] | None, processor: ConceptSegProcessor
    ) -> _Described:
        """What a completion's box (in text units) is about: the target, failing that another object."""
        unknown = cls(task.mask, "", None, _UNKNOWN)
        if not task.mask.any():
            return cls(task.mask, "", None, _TARGET)
        if box is None:
            return unknown
        found = frame.text_box_to_image(box)
        if box_iou(found, mask_to_box(task.mask)) >= 0.3:
            return cls(task.mask, "", None, _TARGET)
        ious = [box_iou(found, item.box) if item.box else 0.0 for item in task.scene.objects]
        best = int(np.argmax(ious))
        return cls(task.scene.objects[best].mask, "", None, best) if ious[best] >= 0.5 else unknown

    @classmethod
    def of_another(cls, rng: np.random.Generator, task: Task) -> _Described:
        """Another visible object; the target where there is none."""
        others = [
            i
            for i, item in enumerate(task.scene.objects)
            if item.mask.any() and not np.array_equal(item.mask, task.mask)
        ]
        if not others:
            return cls.of_target(task)
        index = others[int(rng.integers(len(others)))]
        item = task.scene.objects[index]
        answer = item.look.shape if len(task.answer.split()) == 1 and not item.look.kind else item.look.phrase
        return cls(item.mask, answer, look_classes(item.look), index)

    def box(self, ready: PreparedSample, processor: ConceptSegProcessor) -> tuple[float, ...] | None:
        """In text units; None where nothing is there."""
        return ready.coordinates.image_box_to_text(mask_to_box(self.mask)) if self.mask.any() else None

    def completion(self, task: Task, ready: PreparedSample, processor: ConceptSegProcessor) -> str:
        think = task.think.removesuffix(task.answer) + self.answer
        check = ready.coordinates.check_box
        box = self.box(ready, processor)
        return format_completion(think, task.rule, check, box, self.answer, processor.coordinate_scale)


def _teacher_forced(
    stage: CtmStage, prepared: list[PreparedSample], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """AT-token states of given completions, completion tokens first, (B, T, C), and their mask."""
    batch = stage.processor.collate(prepared, completions, device=stage.device)
    with torch.no_grad():
        states = last_hidden_states(stage.model.vlm, model_inputs(batch))
    # Prompts end in one column, so completions begin in one column.
    first = int(batch["completion_mask"].any(0).nonzero()[0])
    return states[:, first:], batch["completion_mask"][:, first:]


def _append(
    rows: dict,
    kind: str,
    states: Tensor,
    mask: Tensor,
    processor: ConceptSegProcessor,
    answers: list[str],
    boxes: list[tuple[float, ...] | None],
    described: list[_Described],
) -> None:
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
