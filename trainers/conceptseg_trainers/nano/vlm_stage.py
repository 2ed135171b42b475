"""Stage "vlm": Qwen2.5-VL learns to read pictures, then to reason about them in the completion's template.

What makes a small language model learn to read image tokens (else it stays blind for tens of thousands of them):
- a vision tower that has learned to see before, shapes above all;
- a curriculum from naming one object to whole tasks;
- reading what red boxes mark: an own dense head, examples that name marked objects and find them again;
- words replaced where it reads its own text, so that each word of a look is read from the picture;
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
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

from .dense import DENSE_CLASSES, GRID, dense_class_loss, dense_targets, shape_accuracy, visible_objects
from .examples import ExampleWriter, TrainingExample
from .loop import mean
from .scenes import TaskMix, pretraining_scene, sheet_scene, simple_scene
from .tokenizers import COORDINATE_SCALE, build_processor

PERCEPTION_ONLY = 0.1
"""Fraction of the steps, the first, in which there are no tasks yet."""

UNTAUGHT_FAMILIES = frozenset(
    "relation extreme_size extreme_kin beside ordinal distance inside_ring hidden_rule coexistence".split()
)
"""Families whose true choice a base policy is not shown: none of the other families and examples teaches it."""

_GUIDED_LAYER, _GUIDED_HEADS = 3, 2
_NUMBER_SIGMA, _LAST_NUMBER_SIGMA = 1.2, 0.6
_PATCH, _MERGE = 8, 2
_SHEETS = 16  # pictures per step while the vision tower trains alone
_SHORT = 0.25
_BLOCK = 4  # steps that share one kind of example
_FIRST_TASK = 200_000  # far from the tasks that the other stages use


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
    """Trains all of the VLM on examples.

    Args:
        pretraining: Steps in which only the vision tower trains, on the dense heads.
        steps: Steps after those; the curriculum is laid out over them.
        examples: Task examples per step.
        untaught: Families in which the completion describes an object of the scene that is chosen at random; rule and
            check stay true. With them, a quarter of the tasks is written without rule and check.
        name: Name of the stage.
        device: Where to train.
        held_out: Samples of the split "val" that an evaluation takes.
        seed: Seed of the weights and of all that is drawn.
    """

    def __init__(
        self,
        pretraining: int,
        steps: int,
        examples: int = 24,
        untaught: frozenset[str] = frozenset(),
        name: str = "vlm",
        device: str = "cpu",
        held_out: int = 132,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.name, self.untaught, self.seed = name, untaught, seed
        self.pretraining, self.steps, self.examples = pretraining, steps, examples
        self.device, self.held_out, self.is_pretraining = device, held_out, False
        self.processor = build_processor()
        self.writer = ExampleWriter(self.processor)
        self.module = VlmWithHeads().to(device)
        vocabulary = self.processor.tokenizer.get_vocab()
        self.numbers = torch.tensor([vocabulary[str(number)] for number in range(COORDINATE_SCALE + 1)])
        self.first_number = int(self.numbers[0])
        _number_embeddings(self.module.vlm.get_input_embeddings().weight, self.numbers)
        self.tasks = TaskMix()
        self._block: tuple[int, list[TrainingExample]] = (-1, [])

    # Examples

    def progress(self, step: int) -> float:
        """Fraction of the steps after pretraining; equal for the steps of a block."""
        return step // _BLOCK * _BLOCK / self.steps

    def batch(self, step: int) -> list[TrainingExample]:
        """The examples of a step after pretraining: perception first, then more and more whole tasks."""
        block, place = divmod(step, _BLOCK)
        progress = self.progress(step)
        perception = (
            1.0
            if progress < PERCEPTION_ONLY
            else 0.5
            if progress < 0.25
            else 0.25
            if progress < 0.85
            else 0.08
        )
        if self._block[0] != block:
            is_perception = np.random.default_rng([11, self.seed, block]).random() < perception
            # Perception examples are short: more of them cost as much as a batch of tasks.
            count = _BLOCK * self.examples * (3 if is_perception else 2) // 2
            numbers = range(block * count, (block + 1) * count)
            examples = [
                self._perception(progress, number) if is_perception else self._task(number)
                for number in numbers
            ]
            # Examples of a step are of similar length, which leaves little padding.
            examples.sort(key=lambda example: len(example.prompt) + len(example.completion))
            self._block = (block, examples)
        size = len(self._block[1]) // _BLOCK
        return self._block[1][place * size : (place + 1) * size]

    def _task(self, number: int) -> TrainingExample:
        rng = np.random.default_rng([19, self.seed, number])
        task = self.tasks.task(_FIRST_TASK + number)
        chosen = None
        if self.tasks.family(_FIRST_TASK + number) in self.untaught:
            visible = [i for i, item in enumerate(task.scene.objects) if item.mask.any()]
            chosen = visible[int(rng.integers(len(visible)))]
        return self.writer.task(rng, task, chosen, short=bool(self.untaught) and rng.random() < _SHORT)

    def _perception(self, progress: float, number: int) -> TrainingExample:
        rng = np.random.default_rng([13, self.seed, number])
        if progress < 0.05:
            most = 1 if progress < 0.02 else 2 if progress < 0.03 else 3 if progress < 0.04 else 5
            scene = simple_scene(rng, int(rng.integers(max(1, most - 2), most + 1)))
            return self.writer.naming(rng, scene.pixels, visible_objects(scene))
        kind = rng.random()
        if kind < 0.2:
            return self.writer.matching(rng)
        task = self.tasks.task(_FIRST_TASK + number)
        if kind < 0.35 and any(box is not None for _, box in task.references):
            return self.writer.naming_marked(rng, task)
        if kind < 0.45 and len(task.references) > 1:
            return self.writer.naming_mosaic(rng, task)
        scene = sheet_scene(rng) if kind < 0.6 else simple_scene(rng, 5) if kind < 0.75 else task.scene
        write = self.writer.finding if rng.random() < 0.5 else self.writer.naming
        return write(rng, scene.pixels, visible_objects(scene))

    # Loss

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss on the examples of a step."""
        self.is_pretraining = step < self.pretraining
        if self.is_pretraining:
            return self._pretraining_loss(step)
        step -= self.pretraining
        sigma = _NUMBER_SIGMA if self.progress(step) < 0.85 else _LAST_NUMBER_SIGMA
        return self.example_loss(self.batch(step), sigma)

    def _pretraining_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([17, self.seed, step])
        scenes = [pretraining_scene(rng, self.tasks, step * _SHEETS + i) for i in range(_SHEETS)]
        targets = [dense_targets(visible_objects(scene)) for scene in scenes]
        loss = self._dense_loss(targets, self._see([scene.pixels for scene in scenes]))
        return loss, {"dense": loss.item()}

    def _see(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Image tokens (N * GRID * GRID, D) of N pictures."""
        grid = torch.tensor([[1, SIDE // _PATCH, SIDE // _PATCH]], device=self.device).repeat(
            len(pictures), 1
        )
        pixels = patches(pictures, self.device)
        return torch.cat(self.module.vlm.model.get_image_features(pixels, grid).pooler_output)

    def example_loss(
        self, examples: Sequence[TrainingExample], number_sigma: float = _NUMBER_SIGMA
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of words and numbers, guided attention, and the dense heads.

        Args:
            examples: The examples.
            number_sigma: Numbers are soft targets: a Gaussian of this width around the true one.
        """
        batch = pad_examples(
            examples, self.processor.image_token_id, self.processor.tokenizer.pad_token_id, self.device
        )
        vlm = self.module.vlm
        features = self._see([picture for example in examples for picture in example.pictures])
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
        targets = batch["labels"][rows, columns]
        log_probabilities = logits.float().log_softmax(-1)
        number = (targets >= self.first_number) & (targets <= self.first_number + COORDINATE_SCALE)
        words_loss = -log_probabilities[~number].gather(1, targets[~number, None]).mean()
        values = torch.arange(COORDINATE_SCALE + 1, device=self.device)
        distance = (targets[number] - self.first_number)[:, None] - values[None]
        soft = (-0.5 * (distance / number_sigma) ** 2).softmax(1)
        numbers_loss = -(soft * log_probabilities[number][:, self.numbers.to(self.device)]).sum(1).mean()
        focus = _guided_attention(guided, seen, batch["focus"])
        dense = self._dense_loss([target for example in examples for target in example.dense], features)
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
        is_object = classes[:, 0] > 0
        offset = (self.module.dense_box(features[is_object]) - boxes[is_object]).abs().mean()
        return 0.5 * dense_class_loss(self.module.dense_classes(features), classes) + 5.0 * offset

    # Held-out numbers

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On the split "val": fraction of shapes seen right; validity, boxes and answers of greedy completions."""
        self.module.eval()
        split = ConceptShapes("val", size=SIDE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        classes = np.concatenate([dense_targets(visible_objects(scene))[0] for scene in scenes])
        features = self._see([scene.pixels for scene in scenes])
        seen = {
            "shape": shape_accuracy(
                self.module.dense_classes(features), torch.from_numpy(classes).to(self.device)
            )
        }
        if self.is_pretraining:
            return seen
        numbers: dict[str, list[float]] = {}
        further = {
            name: ConceptShapes("val", size=SIDE, groups=[name]) for name in ("which one", "hidden rule")
        }
        new_looks = ConceptShapes("test-compositional", size=SIDE, groups=["diverse classes"])
        for name, source, count in (
            ("", split, self.held_out),
            *((name, source, self.held_out // 2) for name, source in further.items()),
            ("new looks", new_looks, self.held_out // 3),
        ):
            for start in range(0, count, 44):
                samples = [source[i] for i in range(start, min(count, start + 44))]
                self._evaluate_samples(name, samples, numbers)
        return seen | {key: mean(values) for key, values in sorted(numbers.items())}

    def _evaluate_samples(
        self, name: str, samples: list[ConceptSample], numbers: dict[str, list[float]]
    ) -> None:
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
            completion = self.processor.decode_completion(generated.token_ids[row][generated.mask[row]], item)
            check_iou = item.coordinates.check_iou(completion.check)
            if not name:
                numbers.setdefault("format", []).append(float(completion.is_valid))
                if check_iou is not None:
                    numbers.setdefault("check", []).append(check_iou)
            if sample.box is None:
                continue
            ground_truth = item.coordinates.image_box_to_text(sample.box)
            iou = box_iou(completion.bbox, ground_truth) if completion.bbox else 0.0
            numbers.setdefault(f"box_{sample.stratum or name or sample.level}", []).append(iou)
            if not name:
                numbers.setdefault("answer", []).append(float(completion.answer == sample.answer))


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


def pad_examples(examples: Sequence[TrainingExample], image_token: int, pad: int, device: str) -> dict:
    """Examples as tensors, padded on the right.

    Returns:
        input_ids (what is read), labels (what is written), attention_mask, is_image, completion (B, L); position_ids
        (3, B, L); focus: rows (N,), columns (N,) of the place before each guided token, and its image tokens (N, L).
    """
    length = max(len(example.prompt) + len(example.completion) for example in examples)
    shape = (len(examples), length)
    ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, pad, dtype=np.int64)
    mask, completion = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, example in enumerate(examples):
        sequence = [*example.prompt, *example.read]
        start, end = len(example.prompt), len(sequence)
        ids[row, :end] = sequence
        labels[row, start:end] = example.completion
        mask[row, :end] = 1
        completion[row, start:end] = True
        position_ids[:, row, :end] = positions(sequence, image_token)
        pictures = np.flatnonzero(np.asarray(example.prompt) == image_token).reshape(-1, GRID * GRID)
        for focus in example.focus:
            target = np.zeros(length, dtype=bool)
            for picture, tokens in focus.tokens.items():
                target[pictures[picture][tokens]] = True
            rows.append(row)
            columns.append(start + focus.position - 1)
            targets.append(target)
    tensors = {
        "input_ids": ids,
        "labels": labels,
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
