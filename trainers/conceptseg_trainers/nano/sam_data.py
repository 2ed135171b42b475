"""The drawn scenes that the stage "sam" is trained on, with prompts, dense targets and attention targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Scene, SceneObject
from conceptseg_hf.evaluation import foreground_iou, presence_auc
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.sam_prompt import BOX_TEXT, decode, encode_image, encode_text

from ..from_scratch.loop import mean
from ..from_scratch.masks import bounding_box, mask_to_tokens, total
from ..from_scratch.sam_stage import (
    SamStage,
    SegmentationPrompt,
    images_to_pixels,
    jittered,
    logits_to_masks,
    mask_logits,
    sam_boxes,
)
from .dense import DENSE_CLASSES, class_map, dense_class_loss, shape_accuracy, token_objects
from .scenes import TaskMix, pretraining_scene, sheet_scene

_SPECIAL_NOUNS = (
    "shadow",
    "transparent",
    "lesion",
    "scratch",
    "stain",
    "hole",
    "glass circle",
    "hidden square",
)
# Prompts of CD tasks, which do not name an object. SAM 3 is trained to predict that they are absent, so that the router
# uses the VLM.
_CONCEPT_PROMPTS = (
    "camouflaged object segmentation",
    "salient object segmentation",
    "industrial defect segmentation",
    "tissue lesion segmentation",
)


def positive_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for an object of the scene.

    Boxes are more frequent if the words describe several objects, so that only the box determines which one is meant.
    """
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    words = _draw_words(rng, item)
    text_prompt = SegmentationPrompt(" ".join(words), None, scene.mask_of(words))
    is_ambiguous = sum(other.look.matches(item.look.phrase.split()) for other in scene.objects) > 1
    kind = rng.random()
    if kind < (0.4 if is_ambiguous else 0.7) or not item.mask.any():
        return text_prompt
    phrase = BOX_TEXT if rng.random() < 0.5 else item.look.shape if not item.look.kind else " ".join(words)
    box = jittered(rng, bounding_box(item.mask), scene.pixels.shape[0])
    return SegmentationPrompt(phrase, box, item.mask)


def _draw_words(rng: np.random.Generator, item: SceneObject) -> list[str]:
    """Draw words that describe an object."""
    look = item.look
    full = look.phrase.split()
    if look.kind:
        return ["transparent"] if look.kind == "glass" and rng.random() < 0.5 else full
    choice = rng.random()
    if choice < 0.4:
        return full
    if choice < 0.65:
        return [look.color, look.shape]
    if choice < 0.85:
        return [look.shape]
    return [look.color, "object"] if choice < 0.95 or look.texture == "plain" else [look.texture, look.shape]


def negative_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for an object that is not in the scene; some of its words often describe another object."""
    empty = np.zeros(scene.pixels.shape[:2], dtype=bool)
    if rng.random() < 0.15:
        return SegmentationPrompt(
            _CONCEPT_PROMPTS[int(rng.integers(len(_CONCEPT_PROMPTS)))], None, empty, segment=False
        )
    colors, shapes = list(COLORS), list(SHAPES)
    while True:
        look = scene.objects[int(rng.integers(len(scene.objects)))].look
        choice = rng.random()
        if choice < 0.12:
            words = _SPECIAL_NOUNS[int(rng.integers(len(_SPECIAL_NOUNS)))].split()
        elif choice < 0.6 and not look.kind:
            words = look.phrase.split()
            position = int(rng.integers(len(words)))
            replacements = (
                colors
                if words[position] in COLORS
                else shapes
                if words[position] in SHAPES
                else list(TEXTURES[1:])
            )
            words[position] = replacements[int(rng.integers(len(replacements)))]
        else:
            words = [shapes[int(rng.integers(len(shapes)))]]
            if rng.random() < 0.7:
                words.insert(0, colors[int(rng.integers(len(colors)))])
        if not any(other.look.matches(words) for other in scene.objects):
            return SegmentationPrompt(" ".join(words), None, empty)


_HEAD_WORDS = (
    (*COLORS, GREY),
    SHAPES,
    TEXTURES,
    ("glass", "transparent", "hidden", "shadow", "core", "scratch", "stain", "hole", "lesion"),
)


def guidance_targets(
    scene: Scene, prompt: SegmentationPrompt, prompt_length: int, grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention targets for the four heads of SAM 3's fusion, so that it learns to compare words with features.

    Each head is assigned one kind of word: colors, shapes, textures, or names of special objects. Image tokens of
    objects that the word describes should attend to the word, all others to the rest of the prompt. If the prompt has a
    box, heads without a word are assigned the box: image tokens of its object should attend to the token of the box.

    See `SamData.guidance` for arguments and results.
    """
    targets = np.zeros((len(_HEAD_WORDS), grid * grid, prompt_length), dtype=bool)
    guided = np.zeros(len(_HEAD_WORDS), dtype=bool)
    object_indices = token_objects([item.mask for item in scene.objects], grid)
    for position, word in enumerate(prompt.phrase.split(), start=1):
        for head, words in enumerate(_HEAD_WORDS):
            if word not in words:
                continue
            # The last entry, with index -1, is the background.
            matches = np.asarray([*(item.look.matches([word]) for item in scene.objects), False])
            is_described = matches[object_indices]
            guided[head] = True
            targets[head] = True
            targets[head, :, position] = False
            targets[head, is_described] = False
            targets[head, is_described, position] = True
    if prompt.box is not None:
        inside, free = mask_to_tokens(prompt.mask, grid), ~guided
        box_token = np.zeros(prompt_length, dtype=bool)
        box_token[-2] = True
        targets[free] = np.where(inside[:, None], box_token, ~box_token)
        guided[free] = True
    return targets, guided


def make_heads(width: int) -> nn.Module:
    """Return the auxiliary heads for feature maps of the given number of channels."""
    return nn.ModuleList(nn.Conv2d(width, sum(DENSE_CLASSES.values()), 1) for _ in range(3))


class ShapesSamData:
    """Scenes of the tasks, and sheets of objects; see `SamData`.

    Args:
        images: Number of images per step.
        prompts: Number of prompts per image.
        held_out: Number of samples of the split "val" per evaluation.
        seed: Random seed.
    """

    def __init__(self, images: int = 16, prompts: int = 4, held_out: int = 180, seed: int = 0) -> None:
        self.images, self.prompts, self.held_out, self.seed = images, prompts, held_out, seed
        self.tasks = TaskMix()

    def pretraining_scenes(self, step: int) -> list[Scene]:
        """Return the scenes of a step of the pretraining."""
        rng = np.random.default_rng([5, self.seed, step])
        return [pretraining_scene(rng, self.tasks, step * self.images + i) for i in range(self.images)]

    def prompted_scenes(self, step: int) -> list[tuple[Scene, list[SegmentationPrompt]]]:
        """Return the scenes of a step, with one or two prompts for absent objects each."""
        batch = []
        for i in range(self.images):
            index = step * self.images + i
            rng = np.random.default_rng([7, self.seed, index])
            scene = sheet_scene(rng) if rng.random() < 0.2 else self.tasks.task(index).scene
            negatives = 1 + int(rng.random() < 0.35)
            prompts = [positive_prompt(rng, scene) for _ in range(self.prompts - negatives)]
            batch.append((scene, prompts + [negative_prompt(rng, scene) for _ in range(negatives)]))
        return batch

    def pixels(self, scene: Scene) -> np.ndarray:
        """Return the image of a scene."""
        return scene.pixels

    def guidance(
        self, scene: Scene, prompt: SegmentationPrompt, prompt_length: int, grid: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return attention targets; see `guidance_targets`."""
        return guidance_targets(scene, prompt, prompt_length, grid)

    def dense_loss(self, heads: nn.Module, scenes: Sequence[Scene], levels: Sequence[Tensor]) -> Tensor:
        """Compute the cross-entropy of the dense heads, averaged over the feature maps."""
        predictions = _dense_predictions(heads, scenes, levels)
        return total(dense_class_loss(*prediction) for prediction in predictions) / len(predictions)

    def evaluate(self, stage: SamStage[Scene]) -> dict[str, float]:
        """Evaluate on the split "val".

        Metrics: accuracy of the shape; foreground IoU with the answer as the text and with the ground-truth box, by
        level (and by stratum in the group "which one"); AUC of presence on CI.
        """
        split = ConceptShapes("val", size=SIDE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        levels = stage.sam.get_vision_features(pixel_values=stage.pixel_values(scenes)).fpn_hidden_states
        *_, coarsest = _dense_predictions(stage.module.dense, scenes, levels[:-1])
        metrics = {"shape": shape_accuracy(*coarsest)}
        if stage.is_pretraining:
            return metrics
        results = _Results()
        for source in (split, ConceptShapes("val", size=SIDE, groups=["which one"])):
            for start in range(0, self.held_out, 60):
                _evaluate_samples(
                    stage, [source[i] for i in range(start, min(start + 60, self.held_out))], results
                )
        return metrics | results.means()


@dataclass
class _Results:
    """Foreground IoUs by name, and presence scores of CI samples."""

    ious: dict[str, list[float]] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Return the means, and the AUC of presence."""
        means = {name: mean(values) for name, values in sorted(self.ious.items())}
        return means | {"presence_auc": presence_auc(self.scores, self.present) or 0.0}


def _evaluate_samples(stage: SamStage[Scene], samples: list[ConceptSample], results: _Results) -> None:
    """Segment samples by the answer and by the ground-truth box, and add the results."""
    sam, device = stage.sam, stage.device
    features = encode_image(sam, images_to_pixels([np.asarray(sample.image) for sample in samples], device))
    answers = stage.processor.sam_text([sample.answer or "" for sample in samples], device)
    by_text = decode(sam, features, *encode_text(sam, *answers))
    box_text = stage.processor.sam_text([BOX_TEXT] * len(samples), device)
    boxes, _ = sam_boxes([sample.box for sample in samples], SIDE, device)
    by_box = decode(sam, features, *encode_text(sam, *box_text), boxes=boxes)
    presence_logits = by_text.presence_logits
    assert presence_logits is not None  # SAM 3 always returns them
    for sample, text_mask, box_mask, score in zip(
        samples,
        logits_to_masks(mask_logits(by_text), SIDE),
        logits_to_masks(mask_logits(by_box), SIDE),
        presence_logits[:, 0].tolist(),
        strict=True,
    ):
        if sample.level == "CI":
            results.scores.append(score)
            results.present.append(sample.present)
        if sample.present:
            name, ground_truth = sample.stratum or sample.level, np.asarray(sample.mask) > 0
            results.ious.setdefault(f"text_{name}", []).append(foreground_iou(text_mask, ground_truth))
            results.ious.setdefault(f"box_{name}", []).append(foreground_iou(box_mask, ground_truth))


def _dense_predictions(
    heads: nn.Module, scenes: Sequence[Scene], levels: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the logits (N, C) and classes (N, 5) of all positions of each feature map; see `SamData.dense_loss`."""
    maps = np.stack([class_map(scene) for scene in scenes])
    predictions = []
    for head, level in zip(cast(nn.ModuleList, heads), levels, strict=True):
        stride = maps.shape[1] // level.shape[-1]
        classes = maps[:, stride // 2 :: stride, stride // 2 :: stride]
        logits = head(level).permute(0, 2, 3, 1).flatten(0, 2)
        predictions.append((logits, torch.from_numpy(classes).to(level.device).flatten(0, 2)))
    return predictions
