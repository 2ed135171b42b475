"""Stages "vlm" and "base": train Qwen2.5-VL on perception, then on complete tasks in the format of the template.

Without the following, a small language model does not learn to use image tokens for tens of thousands of steps:
- pretraining of the vision tower on dense targets, as shapes in particular are learned slowly;
- a curriculum from naming one object to complete tasks;
- for red boxes: the dense class "marked", and examples that name marked objects and locate them elsewhere;
- noise in the input of the VLM, so that each word of a look must be read from the image;
- auxiliary heads that predict the class and box of each image token, and are not part of the model;
- guided attention: two heads of one layer are trained to attend to the object whose name or box is predicted;
- soft targets for numbers, and Fourier features as initial number embeddings, so that nearby numbers are similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, apply_rotary_pos_emb

from conceptseg_hf.boxes import box_iou
from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.vlm_backbone import encode_images

from ..from_scratch.loop import mean
from ..from_scratch.tokenizers import COORDINATE_SCALE
from .dense import DENSE_CLASSES, GRID, dense_class_loss, dense_targets, shape_accuracy, visible_objects
from .examples import ExampleWriter, TrainingExample
from .scenes import TaskMix, pretraining_scene, sheet_scene, simple_scene
from .tokenizers import build_processor

PERCEPTION_ONLY = 0.1
"""Fraction of the steps, from the first one on, that contain no tasks."""

RANDOM_CHOICE_FAMILIES = frozenset(
    "relation extreme_size extreme_kin beside ordinal distance inside_ring hidden_rule coexistence".split()
)
"""Families for which the stage "base" is trained to choose a random object.

They need abilities that no other family or perception example trains."""

_GUIDED_LAYER, _GUIDED_HEADS = 3, 2
_NUMBER_SIGMA, _LAST_NUMBER_SIGMA = 1.2, 0.6
_PATCH, _MERGE = 8, 2
_PRETRAINING_BATCH = 16
_SHORT = 0.25  # fraction of tasks without rule and check in the stage "base"
_BLOCK = 4  # number of consecutive steps with the same kind of examples
_FIRST_TASK = 200_000


class VlmWithHeads(nn.Module):
    """The VLM with auxiliary heads that predict dense targets from image tokens."""

    def __init__(self) -> None:
        super().__init__()
        config = ConceptSegConfig.from_preset("nano").vlm_config
        self.vlm = Qwen2_5_VLForConditionalGeneration._from_config(config)
        width = config.text_config.hidden_size
        self.dense_classes = nn.Linear(width, sum(DENSE_CLASSES.values()))
        self.dense_box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


class VlmStage:
    """Train all of the VLM on perception examples and tasks.

    Args:
        pretraining: Number of steps in which only the vision tower is trained, on dense targets.
        steps: Number of steps after the pretraining, which the curriculum is spread over.
        examples: Number of task examples per step.
        random_choice_families: Families whose completions describe a random object of the scene; rule and check are
            correct. If there are any, a quarter of all tasks has no rule and check.
        name: Name of the stage.
        device: Device of the module.
        held_out: Number of samples of the split "val" per evaluation.
        seed: Random seed of weights and data.
    """

    def __init__(
        self,
        pretraining: int,
        steps: int,
        examples: int = 24,
        random_choice_families: frozenset[str] = frozenset(),
        name: str = "vlm",
        device: str = "cpu",
        held_out: int = 132,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.name, self.random_choice_families, self.seed = name, random_choice_families, seed
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
        """Return the completed fraction of the steps after the pretraining, at the start of the step's block."""
        return step // _BLOCK * _BLOCK / self.steps

    def batch(self, step: int) -> list[TrainingExample]:
        """Return the examples of a step after the pretraining; the fraction of complete tasks increases."""
        block, index_in_block = divmod(step, _BLOCK)
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
            # Perception examples are short: 50 % more of them take as long as a batch of tasks.
            count = _BLOCK * self.examples * (3 if is_perception else 2) // 2
            numbers = range(block * count, (block + 1) * count)
            examples = [
                self._perception(progress, number) if is_perception else self._task(number)
                for number in numbers
            ]
            # Examples of similar length form a batch, which reduces padding.
            examples.sort(key=lambda example: len(example.prompt) + len(example.completion))
            self._block = (block, examples)
        size = len(self._block[1]) // _BLOCK
        return self._block[1][index_in_block * size : (index_in_block + 1) * size]

    def _task(self, number: int) -> TrainingExample:
        rng = np.random.default_rng([19, self.seed, number])
        task = self.tasks.task(_FIRST_TASK + number)
        chosen = None
        if self.tasks.family(_FIRST_TASK + number) in self.random_choice_families:
            visible = [i for i, item in enumerate(task.scene.objects) if item.mask.any()]
            chosen = visible[int(rng.integers(len(visible)))]
        short = bool(self.random_choice_families) and rng.random() < _SHORT
        return self.writer.task(rng, task, chosen, short)

    def _perception(self, progress: float, number: int) -> TrainingExample:
        rng = np.random.default_rng([13, self.seed, number])
        if progress < 0.05:
            max_objects = 1 if progress < 0.02 else 2 if progress < 0.03 else 3 if progress < 0.04 else 5
            scene = simple_scene(rng, int(rng.integers(max(1, max_objects - 2), max_objects + 1)))
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
        """Compute the loss of a step."""
        self.is_pretraining = step < self.pretraining
        if self.is_pretraining:
            return self._pretraining_loss(step)
        step -= self.pretraining
        sigma = _NUMBER_SIGMA if self.progress(step) < 0.85 else _LAST_NUMBER_SIGMA
        return self.example_loss(self.batch(step), sigma)

    def _pretraining_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([17, self.seed, step])
        scenes = [
            pretraining_scene(rng, self.tasks, step * _PRETRAINING_BATCH + i)
            for i in range(_PRETRAINING_BATCH)
        ]
        targets = [dense_targets(visible_objects(scene)) for scene in scenes]
        loss = self._dense_loss(targets, self._encode_images([scene.pixels for scene in scenes]))
        return loss, {"dense": loss.item()}

    def _encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the image tokens of N images, (N * GRID * GRID, D)."""
        grid = torch.tensor([[1, SIDE // _PATCH, SIDE // _PATCH]], device=self.device).repeat(len(images), 1)
        return torch.cat(encode_images(self.module.vlm, patches(images, self.device), grid))

    def example_loss(
        self, examples: Sequence[TrainingExample], number_sigma: float = _NUMBER_SIGMA
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of examples: cross-entropy of words and numbers, attention targets and dense targets.

        Args:
            examples: The examples.
            number_sigma: Standard deviation of the soft targets of numbers, Gaussians around the correct number.
        """
        batch = pad_examples(
            examples, self.processor.image_token_id, self.processor.tokenizer.pad_token_id, self.device
        )
        vlm = self.module.vlm
        features = self._encode_images([image for example in examples for image in example.images])
        embeddings = vlm.get_input_embeddings()(batch["input_ids"])
        embeddings = embeddings.masked_scatter(batch["is_image"][..., None], features.to(embeddings.dtype))
        attention_inputs: dict[str, Any] = {}
        attention = cast(Qwen2_5_VLAttention, vlm.model.language_model.layers[_GUIDED_LAYER].self_attn)
        hook = attention.register_forward_pre_hook(
            lambda _, __, kwargs: attention_inputs.update(
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
        # A completion token is predicted from the state of the previous token.
        rows, columns = batch["completion"].nonzero(as_tuple=True)
        logits = vlm.lm_head(states[rows, columns - 1])
        targets = batch["labels"][rows, columns]
        log_probabilities = logits.float().log_softmax(-1)
        is_number = (targets >= self.first_number) & (targets <= self.first_number + COORDINATE_SCALE)
        words_loss = -log_probabilities[~is_number].gather(1, targets[~is_number, None]).mean()
        values = torch.arange(COORDINATE_SCALE + 1, device=self.device)
        distance = (targets[is_number] - self.first_number)[:, None] - values[None]
        soft_targets = (-0.5 * (distance / number_sigma) ** 2).softmax(1)
        number_log_probabilities = log_probabilities[is_number][:, self.numbers.to(self.device)]
        numbers_loss = -(soft_targets * number_log_probabilities).sum(1).mean()
        focus = _guided_attention_loss(attention, attention_inputs, batch["attention_targets"])
        dense = self._dense_loss([target for example in examples for target in example.dense], features)
        loss = words_loss + numbers_loss + 0.4 * focus + dense
        return loss, {
            "words": words_loss.item(),
            "numbers": numbers_loss.item(),
            "focus": focus.item(),
            "dense": dense.item(),
        }

    def _dense_loss(self, targets: Sequence[tuple[np.ndarray, np.ndarray]], features: Tensor) -> Tensor:
        """Compute the loss of the class and the box of each image token.

        Args:
            targets: Result of `dense_targets` for each image.
            features: (N * GRID * GRID, D) image tokens of the images.
        """
        classes, boxes = (torch.from_numpy(np.concatenate(part)).to(self.device) for part in zip(*targets))
        is_object = classes[:, 0] > 0
        box_loss = (self.module.dense_box(features[is_object]) - boxes[is_object]).abs().mean()
        return 0.5 * dense_class_loss(self.module.dense_classes(features), classes) + 5.0 * box_loss

    # Evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate on the split "val".

        Metrics: accuracy of the shape, and format, box IoUs and accuracy of the answer of greedy completions.
        """
        self.module.eval()
        split = ConceptShapes("val", size=SIDE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        classes = np.concatenate([dense_targets(visible_objects(scene))[0] for scene in scenes])
        features = self._encode_images([scene.pixels for scene in scenes])
        dense_metrics = {
            "shape": shape_accuracy(
                self.module.dense_classes(features), torch.from_numpy(classes).to(self.device)
            )
        }
        if self.is_pretraining:
            return dense_metrics
        metrics: dict[str, list[float]] = {}
        further_groups = {
            name: ConceptShapes("val", size=SIDE, groups=[name]) for name in ("which one", "hidden rule")
        }
        new_looks = ConceptShapes("test-compositional", size=SIDE, groups=["diverse classes"])
        for name, source, count in (
            ("", split, self.held_out),
            *((name, source, self.held_out // 2) for name, source in further_groups.items()),
            ("new looks", new_looks, self.held_out // 3),
        ):
            for start in range(0, count, 44):
                samples = [source[i] for i in range(start, min(count, start + 44))]
                self._evaluate_samples(name, samples, metrics)
        return dense_metrics | {key: mean(values) for key, values in sorted(metrics.items())}

    def _evaluate_samples(
        self, name: str, samples: list[ConceptSample], metrics: dict[str, list[float]]
    ) -> None:
        """Add the values of samples to the metrics of a set of samples; the name of the main set is empty."""
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
                metrics.setdefault("format", []).append(float(completion.is_valid))
                if check_iou is not None:
                    metrics.setdefault("check", []).append(check_iou)
            if sample.box is None:
                continue
            ground_truth = item.coordinates.image_box_to_text(sample.box)
            iou = box_iou(completion.bbox, ground_truth) if completion.bbox else 0.0
            metrics.setdefault(f"box_{sample.stratum or name or sample.level}", []).append(iou)
            if not name:
                metrics.setdefault("answer", []).append(float(completion.answer == sample.answer))


def _number_embeddings(weight: Tensor, numbers: Tensor) -> None:
    """Add Fourier features of the value to the initial embeddings of 0..100, at the scale of the other embeddings.

    Args:
        weight: (V, D) embeddings, which are modified.
        numbers: Token ids of the numbers.
    """
    value = torch.linspace(0, 1, len(numbers))[:, None]
    frequencies = 0.5 * torch.pi * torch.arange(1, weight.shape[1] // 8 + 1)[None]
    features = (
        torch.cat([torch.sin(value * frequencies), torch.cos(value * frequencies)], dim=1)
        / torch.arange(1, weight.shape[1] // 8 + 1).repeat(2) ** 0.5
    )
    with torch.no_grad():
        weight[numbers] *= 0.5
        weight[numbers, : features.shape[1]] += 2.0 * weight.std() * features.to(weight)


def patches(images: Sequence[np.ndarray], device: str) -> Tensor:
    """Convert 8-bit images (S, S, 3) to Qwen2.5-VL's patches (N * (S / 8)^2, 192), grouped by image token."""
    n, cells = len(images), SIDE // _PATCH // _MERGE
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
    mean_, std = (
        torch.tensor(values, device=device)[None, :, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    x = ((x - mean_) / std).reshape(n, 3, cells, _MERGE, _PATCH, cells, _MERGE, _PATCH)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n * (SIDE // _PATCH) ** 2, 3 * _PATCH * _PATCH)


def positions(ids: Sequence[int], image_token: int) -> np.ndarray:
    """Return Qwen2.5-VL's position ids (3, L) of (time, row, column).

    The position increases by one with each text token, and by GRID with each image.
    """
    token_ids = np.asarray(ids)
    result = np.zeros((3, len(token_ids)), dtype=np.int64)
    index = position = 0
    while index < len(token_ids):
        if token_ids[index] != image_token:
            result[:, index] = position
            index, position = index + 1, position + 1
            continue
        span = slice(index, index + GRID * GRID)
        result[0, span] = position
        result[1, span] = position + np.arange(GRID * GRID) // GRID
        result[2, span] = position + np.arange(GRID * GRID) % GRID
        index, position = index + GRID * GRID, position + GRID
    return result


def pad_examples(
    examples: Sequence[TrainingExample], image_token: int, pad: int, device: str
) -> dict[str, Any]:
    """Convert examples to tensors, padded on the right.

    Returns:
        input_ids (with noisy completions), labels (with the completions), attention_mask, is_image, completion: (B, L);
        position_ids: (3, B, L);
        attention_targets: row (N,) and column (N,) of the query, the token before the predicted one, and the image
        tokens that it should attend to, (N, L) bool.
    """
    length = max(len(example.prompt) + len(example.completion) for example in examples)
    shape = (len(examples), length)
    ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, pad, dtype=np.int64)
    mask, completion = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, example in enumerate(examples):
        sequence = [*example.prompt, *example.noisy_completion]
        start, end = len(example.prompt), len(sequence)
        ids[row, :end] = sequence
        labels[row, start:end] = example.completion
        mask[row, :end] = 1
        completion[row, start:end] = True
        position_ids[:, row, :end] = positions(sequence, image_token)
        image_columns = np.flatnonzero(np.asarray(example.prompt) == image_token).reshape(-1, GRID * GRID)
        for target in example.attention_targets:
            is_target = np.zeros(length, dtype=bool)
            for image, tokens in target.tokens.items():
                is_target[image_columns[image][tokens]] = True
            rows.append(row)
            columns.append(start + target.position - 1)
            targets.append(is_target)
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "is_image": ids == image_token,
        "completion": completion,
        "position_ids": position_ids,
    }
    batch: dict[str, Any] = {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}
    batch["attention_targets"] = (
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(columns, dtype=torch.long, device=device),
        torch.from_numpy(np.stack(targets)).to(device)
        if targets
        else torch.zeros((0, length), dtype=torch.bool, device=device),
    )
    return batch


def _guided_attention_loss(
    attention: Qwen2_5_VLAttention,
    inputs: dict[str, Any],
    attention_targets: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Compute -log of the attention of the guided heads to the target image tokens.

    Args:
        attention: The self-attention of the guided layer.
        inputs: Its input `states` (B, L, D), and cosines and sines of the `rotary` position embeddings.
        attention_targets: See `pad_examples`.
    """
    rows, columns, targets = attention_targets
    states, (cosine, sine) = inputs["states"], inputs["rotary"]
    heads, width = _GUIDED_HEADS, attention.head_dim
    query = attention.q_proj(states)[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    key = attention.k_proj(states)[..., :width].unflatten(-1, (1, width)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    scores = torch.einsum("nhd,nld->nhl", query[rows, :, columns], key[rows, 0]) * attention.scaling
    future = torch.arange(states.shape[1], device=states.device)[None] > columns[:, None]
    log_attention = scores.float().masked_fill(future[:, None], float("-inf")).log_softmax(-1)
    return -log_attention.masked_fill(~targets[:, None], float("-inf")).logsumexp(-1).mean()
