"""Stage "vlm": Qwen2.5-VL learns to read pictures, then to reason about them in the completion's template.

What makes a small language model learn to read image tokens (else it stays blind for tens of thousands of them):
- a vision tower that has learned to see before, shapes above all;
- a curriculum from naming lessons on one object to whole tasks;
- dense heads on the image tokens (class and box of what each shows), thrown away afterwards;
- guided attention: while a number or a name is being chosen, two heads of one layer are told on which image
  tokens to look;
- soft targets for numbers, and number embeddings that start as Fourier features, so that near numbers are
  near.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from conceptseg_hf.boxes import box_iou
from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

from .lessons import (
    DENSE_CLASSES,
    GRID,
    Lesson,
    LessonWriter,
    dense_class_loss,
    dense_targets,
    shape_accuracy,
    sheet_scene,
    sight_scene,
    simple_scene,
    visible_things,
)
from .loop import mean
from .tokenizers import COORDINATE_SCALE, build_processor

_GUIDED_LAYER, _GUIDED_HEADS = 2, 2
_NUMBER_SIGMA = 1.2
_PATCH, _MERGE = 8, 2
_SHEETS = 16  # pictures per step while the vision tower trains alone
_BLOCK = 4  # steps that share one kind of lesson


class VlmWithHeads(nn.Module):
    """The VLM and the dense heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        config = ConceptSegConfig.from_preset("nano").vlm_config
        self.vlm = Qwen2_5_VLForConditionalGeneration._from_config(config)
        width = config.text_config.hidden_size
        self.dense_classes = nn.Linear(width, sum(DENSE_CLASSES.values()))
        self.dense_box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


class VlmStage:
    """Trains all of the VLM on lessons.

    Args:
        sight: Steps in which only the vision tower trains, on the dense heads.
        steps: Steps after those; the curriculum of lessons is laid out over them.
        lessons: Lessons per step.
        device: Where to train.
        held_out: Samples of the split "val" that an evaluation takes.
    """

    name = "vlm"

    def __init__(
        self, sight: int, steps: int, lessons: int = 24, device: str = "cpu", held_out: int = 132
    ) -> None:
        torch.manual_seed(0)
        self.sight, self.steps, self.lessons = sight, steps, lessons
        self.device, self.held_out, self.seeing = device, held_out, False
        self.processor = build_processor()
        self.writer = LessonWriter(self.processor)
        self.module = VlmWithHeads().to(device)
        vocabulary = self.processor.tokenizer.get_vocab()
        self.numbers = torch.tensor([vocabulary[str(number)] for number in range(COORDINATE_SCALE + 1)])
        self.first_number = int(self.numbers[0])
        _number_embeddings(self.module.vlm.get_input_embeddings().weight, self.numbers)
        distance = torch.arange(COORDINATE_SCALE + 1)[:, None] - torch.arange(COORDINATE_SCALE + 1)[None]
        soft = torch.exp(-0.5 * (distance / _NUMBER_SIGMA) ** 2)
        self.soft_numbers = (soft / soft.sum(1, keepdim=True)).to(device)
        self.train_split = ConceptShapes("train", size=SIDE)
        self._tasks: tuple[int, list[Lesson]] = (-1, [])

    # Lessons

    def batch(self, step: int) -> list[Lesson]:
        """The lessons of a step: naming first, with more and more objects, then more and more whole tasks."""
        block, place = divmod(step, _BLOCK)
        progress = block * _BLOCK / self.steps
        naming = 1.0 if progress < 0.18 else 0.45 if progress < 0.4 else 0.2 if progress < 0.85 else 0.08
        if np.random.default_rng([11, block]).random() < naming:
            # Naming lessons are short: twice as many cost as much as a batch of tasks.
            return [self._naming(progress, step * self.lessons * 2 + i) for i in range(self.lessons * 2)]
        if self._tasks[0] != block:
            first = block * _BLOCK * self.lessons
            lessons = [
                self.writer.task_lesson(self.train_split.task(self._task_index(first + i)))
                for i in range(_BLOCK * self.lessons)
            ]
            # Steps of equal lengths have little padding.
            self._tasks = (
                block,
                sorted(lessons, key=lambda lesson: len(lesson.prompt) + len(lesson.completion)),
            )
        return self._tasks[1][place * self.lessons : (place + 1) * self.lessons]

    def _task_index(self, number: int) -> int:
        # Far from the indices that the other stages use.
        return 200_000 + number % 700_000

    def _naming(self, progress: float, number: int) -> Lesson:
        rng = np.random.default_rng([13, number])
        most = 1 if progress < 0.03 else 2 if progress < 0.05 else 3 if progress < 0.07 else 5
        kind = rng.random()
        if progress >= 0.07 and kind < 0.2:
            scene = sheet_scene(rng)
        elif progress < 0.07 or kind < 0.45:
            scene = simple_scene(rng, int(rng.integers(max(1, most - 2), most + 1)))
        else:
            task = self.train_split.task(self._task_index(number))
            if kind < 0.75 and len(task.references) > 1:
                return self.writer.mosaic_naming_lesson(rng, task)
            scene = task.scene
        finding = progress >= 0.07 and rng.random() < 0.5
        write = self.writer.finding_lesson if finding else self.writer.naming_lesson
        return write(rng, scene.pixels, visible_things(scene))

    # Loss

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss on the lessons of a step."""
        self.seeing = step < self.sight
        return self._sight_loss(step) if self.seeing else self.lesson_loss(self.batch(step - self.sight))

    def _sight_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([17, step])
        scenes = [sight_scene(rng, self.train_split, step * _SHEETS + i) for i in range(_SHEETS)]
        targets = [dense_targets(visible_things(scene)) for scene in scenes]
        loss = self._dense_loss(targets, self._see([scene.pixels for scene in scenes]))
        return loss, {"dense": loss.item()}

    def _see(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Image tokens (N * GRID * GRID, D) of N pictures."""
        grid = torch.tensor([[1, SIDE // _PATCH, SIDE // _PATCH]], device=self.device).repeat(
            len(pictures), 1
        )
        pixels = patches(pictures, self.device)
        return torch.cat(self.module.vlm.model.get_image_features(pixels, grid).pooler_output)

    def lesson_loss(self, lessons: Sequence[Lesson]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of words and numbers, guided attention, and the dense heads."""
        batch = pad_lessons(
            lessons, self.processor.image_token_id, self.processor.tokenizer.pad_token_id, self.device
        )
        vlm = self.module.vlm
        features = self._see([picture for lesson in lessons for picture in lesson.pictures])
        embeddings = vlm.get_input_embeddings()(batch["input_ids"])
        embeddings = embeddings.masked_scatter(batch["is_image"][..., None], features.to(embeddings.dtype))
        seen: dict[str, Tensor] = {}
        guided = vlm.model.language_model.layers[_GUIDED_LAYER].self_attn
        hook = guided.register_forward_pre_hook(
            lambda _, __, kwargs: seen.update(
                states=kwargs["hidden_states"], rotary=kwargs["position_embeddings"]
            ),
            with_kwargs=True,
        )
        states = vlm.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        hook.remove()
        # The state before a completion token predicts it.
        rows, columns = batch["completion"].nonzero(as_tuple=True)
        logits = vlm.lm_head(states[rows, columns - 1])
        targets = batch["input_ids"][rows, columns]
        log_probabilities = logits.float().log_softmax(-1)
        number = (targets >= self.first_number) & (targets <= self.first_number + COORDINATE_SCALE)
        words_loss = -log_probabilities[~number].gather(1, targets[~number, None]).mean()
        soft = self.soft_numbers[targets[number] - self.first_number]
        numbers_loss = -(soft * log_probabilities[number][:, self.numbers.to(self.device)]).sum(1).mean()
        focus = _guided_attention(guided, seen, batch["focus"])
        dense = self._dense_loss([target for lesson in lessons for target in lesson.dense], features)
        loss = words_loss + numbers_loss + 0.4 * focus + dense
        return loss, {
            "words": words_loss.item(),
            "numbers": numbers_loss.item(),
            "focus": focus.item(),
            "dense": dense.item(),
        }

    def _dense_loss(self, targets: Sequence[tuple[np.ndarray, np.ndarray]], features: Tensor) -> Tensor:
        """What every image token shows, and the box of it."""
        classes, boxes = (torch.from_numpy(np.concatenate(part)).to(self.device) for part in zip(*targets))
        something = classes[:, 0] > 0
        offset = (self.module.dense_box(features[something]) - boxes[something]).abs().mean()
        return 0.5 * dense_class_loss(self.module.dense_classes(features), classes) + 5.0 * offset

    # Held-out numbers

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On the split "val": share of shapes seen right; validity, boxes and answers of greedy completions."""
        self.module.eval()
        split = ConceptShapes("val", size=SIDE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        classes = np.concatenate([dense_targets(visible_things(scene))[0] for scene in scenes])
        features = self._see([scene.pixels for scene in scenes])
        seen = {
            "shape": shape_accuracy(
                self.module.dense_classes(features), torch.from_numpy(classes).to(self.device)
            )
        }
        if self.seeing:
            return seen
        totals: dict[str, list[float]] = {"format": [], "answer": [], "check": []}
        by_level: dict[str, list[float]] = {"CI": [], "CD": [], "CR": []}
        for start in range(0, self.held_out, 44):
            samples = [split[i] for i in range(start, min(self.held_out, start + 44))]
            prepared = [
                self.processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples
            ]
            generated = generate_with_states(
                self.module.vlm,
                self.processor.collate(prepared, device=self.device),
                {"max_new_tokens": 80},
                hidden_states_at="predict",
            )
            for row, (sample, item) in enumerate(zip(samples, prepared, strict=True)):
                completion = self.processor.decode_completion(
                    generated.token_ids[row][generated.mask[row]], item
                )
                totals["format"].append(float(completion.is_valid))
                check_iou = item.coordinates.check_iou(completion.check)
                if check_iou is not None:
                    totals["check"].append(check_iou)
                if sample.box is None:
                    continue
                totals["answer"].append(float(completion.answer == sample.answer))
                ground_truth = item.coordinates.image_box_to_text(sample.box)
                by_level[sample.level].append(
                    box_iou(completion.bbox, ground_truth) if completion.bbox else 0.0
                )
        return {
            **seen,
            **{key: mean(v) for key, v in totals.items()},
            **{f"box_{level}": mean(v) for level, v in by_level.items()},
        }


def _number_embeddings(weight: Tensor, numbers: Tensor) -> None:
    """Starts the embeddings of 0..100 as Fourier features of their value, at the scale of the others."""
    value = torch.linspace(0, 1, len(numbers))[:, None]
    frequencies = 0.5 * torch.pi * torch.arange(1, weight.shape[1] // 8 + 1)[None]
    features = (
        torch.cat([torch.sin(value * frequencies), torch.cos(value * frequencies)], dim=1)
        / torch.arange(1, weight.shape[1] // 8 + 1).repeat(2) ** 0.5
    )
    with torch.no_grad():
        weight[numbers] *= 0.5
        weight[numbers, : features.shape[1]] += 2.0 * weight.std() * features.to(weight)


def patches(pictures: Sequence[np.ndarray], device: str) -> Tensor:
    """8-bit pictures (S, S, 3) as Qwen2.5-VL's patches (N * (S / 8)^2, 192), those of an image token together."""
    n, cells = len(pictures), SIDE // _PATCH // _MERGE
    x = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
    mean_, std = (
        torch.tensor(values, device=device)[None, :, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    x = ((x - mean_) / std).reshape(n, 3, cells, _MERGE, _PATCH, cells, _MERGE, _PATCH)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * (SIDE // _PATCH) ** 2, 3 * _PATCH * _PATCH)


def positions(ids: Sequence[int], image_token: int) -> np.ndarray:
    """Qwen2.5-VL's positions (3, L): text counts on, an image spans rows and columns and advances by its side."""
    ids = np.asarray(ids)
    result = np.zeros((3, len(ids)), dtype=np.int64)
    index = position = 0
    while index < len(ids):
        if ids[index] != image_token:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        span = slice(index, index + GRID * GRID)
        result[0, span] = position
        result[1, span] = position + np.arange(GRID * GRID) // GRID
        result[2, span] = position + np.arange(GRID * GRID) % GRID
        index, position = index + GRID * GRID, position + GRID
    return result


def pad_lessons(lessons: Sequence[Lesson], image_token: int, pad: int, device: str) -> dict:
    """Lessons as tensors, padded on the right.

    Returns:
        input_ids, attention_mask, is_image, completion (B, L); position_ids (3, B, L); focus: rows (N,), columns
        (N,) of the place before each guided token, and its image tokens (N, L).
    """
    length = max(len(lesson.prompt) + len(lesson.completion) for lesson in lessons)
    shape = (len(lessons), length)
    ids = np.full(shape, pad, dtype=np.int64)
    mask, completion = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, lesson in enumerate(lessons):
        sequence = [*lesson.prompt, *lesson.completion]
        start, end = len(lesson.prompt), len(sequence)
        ids[row, :end] = sequence
        mask[row, :end] = 1
        completion[row, start:end] = True
        position_ids[:, row, :end] = positions(sequence, image_token)
        pictures = np.flatnonzero(np.asarray(lesson.prompt) == image_token).reshape(-1, GRID * GRID)
        for focus in lesson.focus:
            target = np.zeros(length, dtype=bool)
            target[pictures[focus.picture][focus.tokens]] = True
            rows.append(row)
            columns.append(start + focus.position - 1)
            targets.append(target)
    tensors = {
        "input_ids": ids,
        "attention_mask": mask,
        "is_image": ids == image_token,
        "completion": completion,
        "position_ids": position_ids,
    }
    batch: dict = {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}
    batch["focus"] = (
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(columns, dtype=torch.long, device=device),
        torch.from_numpy(np.stack(targets)).to(device)
        if targets
        else torch.zeros((0, length), dtype=torch.bool, device=device),
    )
    return batch


def _guided_attention(
    attention: nn.Module, seen: dict[str, Tensor], focus: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """-log of the attention that the guided heads spend on the image tokens where the answer is."""
    rows, columns, targets = focus
    states, (cosine, sine) = seen["states"], seen["rotary"]
    heads, width = _GUIDED_HEADS, attention.head_dim
    query = attention.q_proj(states)[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    key = attention.k_proj(states)[..., :width].unflatten(-1, (1, width)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    scores = torch.einsum("nhd,nld->nhl", query[rows, :, columns], key[rows, 0]) * attention.scaling
    future = torch.arange(states.shape[1], device=states.device)[None] > columns[:, None]
    log_attention = scores.float().masked_fill(future[:, None], float("-inf")).log_softmax(-1)
    return -log_attention.masked_fill(~targets[:, None], float("-inf")).logsumexp(-1).mean()
