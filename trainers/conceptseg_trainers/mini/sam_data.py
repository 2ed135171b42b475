"""The photographs, compositions and drawings that the stage "sam" is trained on, with prompts and dense targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf.evaluation import foreground_iou, presence_auc
from conceptseg_hf.losses import dice_loss
from conceptseg_hf.presets import MINI_IMAGE_SIZE as SIDE
from conceptseg_hf.sam_prompt import BOX_TEXT, decode, encode_image, encode_text

from ..from_scratch.loop import mean
from ..from_scratch.masks import bounding_box, mask_to_tokens, total
from ..from_scratch.sam_stage import (
    SamStage,
    SegmentationPrompt,
    at_same_size,
    focal_loss,
    images_to_pixels,
    jittered,
    logits_to_masks,
    mask_logits,
    sam_boxes,
)
from ..nano import sam_data as drawings
from .dense import CHANNELS, NOUNS
from .nouns import PROMPTS_WITHOUT_NOUN
from .photographs import PhotographLibrary
from .scenes import Scene
from .sources import SceneMix

_MAX_NOUNS = 8  # nouns per image in the dense targets
_SHEETS = 0.4  # fraction of the images that show several photographs in a grid
_HEADS = 4  # attention heads of SAM 3's fusion


def make_heads(width: int) -> nn.Module:
    """Return the auxiliary heads for feature maps of the given number of channels: a logit map for each noun."""
    return nn.ModuleList(nn.Conv2d(width, len(NOUNS), 1) for _ in range(3))


class PhotosSamData:
    """Scenes of photographs; see `SamData`.

    Args:
        root: Folder of the benchmark `photos`.
        images: Number of images per step.
        prompts: Number of prompts per image.
        held_out: Number of photographs per dataset and evaluation.
        seed: Random seed.
    """

    def __init__(
        self, root: Path, images: int = 16, prompts: int = 3, held_out: int = 24, seed: int = 0
    ) -> None:
        self.images, self.prompts, self.held_out, self.seed = images, prompts, held_out, seed
        self.scenes = SceneMix(root, SIDE, seed)
        self.validation = PhotographLibrary(root, "val", SIDE)

    # Scenes

    def pretraining_scenes(self, step: int) -> list[Scene]:
        """Return the scenes of a step of the pretraining."""
        return [self.scenes.scene(5, step * self.images + i) for i in range(self.images)]

    def prompted_scenes(self, step: int) -> list[tuple[Scene, list[SegmentationPrompt]]]:
        """Return the scenes of a step, with one prompt for an absent object each."""
        batch = []
        for i in range(self.images):
            index = step * self.images + i
            rng = np.random.default_rng([11, self.seed, index])
            scene = (self.scenes.sheet if rng.random() < _SHEETS else self.scenes.scene)(7, index)
            prompts = [positive_prompt(rng, scene) for _ in range(self.prompts - 1)]
            batch.append((scene, [*prompts, negative_prompt(rng, scene)]))
        return batch

    def pixels(self, scene: Scene) -> np.ndarray:
        """Return the image of a scene."""
        return scene.pixels

    # Losses

    def dense_loss(self, heads: nn.Module, scenes: Sequence[Scene], levels: Sequence[Tensor]) -> Tensor:
        """Compute dice + focal of the maps of nouns known to be present or absent, averaged over the levels."""
        channels: list[list[int]] = []
        masks: list[np.ndarray] = []
        for scene in scenes:
            targets = {noun: mask for noun, mask in scene.masks().items() if noun in NOUNS}
            empty = np.zeros((SIDE, SIDE), dtype=bool)
            targets = dict(list(targets.items())[:_MAX_NOUNS]) | dict.fromkeys(scene.absent, empty)
            channels.append([CHANNELS[noun] for noun in targets])
            masks.extend(targets.values())
        device = levels[0].device
        ground_truth = torch.from_numpy(np.stack(masks)).to(device).float()
        present = ground_truth.flatten(1).any(1)
        losses = []
        for head, level in zip(cast(nn.ModuleList, heads), levels, strict=True):
            noun_logits = _noun_logits(cast(nn.Conv2d, head), level, channels)
            logits, soft_masks = at_same_size(noun_logits[:, None], ground_truth)
            losses.append(
                dice_loss(logits[present], soft_masks[present]) + 10 * focal_loss(logits, soft_masks).mean()
            )
        return total(losses) / len(losses)

    def guidance(
        self, scene: Scene, prompt: SegmentationPrompt, prompt_length: int, grid: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return attention targets: the words and the box at the object, the other tokens of the prompt elsewhere."""
        if scene.drawn is not None:
            return drawings.guidance_targets(scene.drawn, prompt, prompt_length, grid)
        targets = np.zeros((_HEADS, grid * grid, prompt_length), dtype=bool)
        guided = np.zeros(_HEADS, dtype=bool)
        inside = mask_to_tokens(prompt.mask, grid) if prompt.mask.any() else np.zeros(grid * grid, dtype=bool)
        box_heads = range(_HEADS) if prompt.phrase == BOX_TEXT else range(_HEADS // 2, _HEADS)
        if prompt.segment and prompt.phrase != BOX_TEXT:
            words = np.zeros(prompt_length, dtype=bool)
            words[1 : 1 + len(prompt.phrase.split())] = True
            targets[: _HEADS // 2] = np.where(inside[:, None], words, ~words)
            guided[: _HEADS // 2] = True
        if prompt.box is not None:
            box_token = np.zeros(prompt_length, dtype=bool)
            box_token[-2] = True
            targets[list(box_heads)] = np.where(inside[:, None], box_token, ~box_token)
            guided[list(box_heads)] = True
        return targets, guided

    # Evaluation

    def evaluate(self, stage: SamStage[Scene]) -> dict[str, float]:
        """Evaluate photographs of the part "val", and composed scenes with identical objects.

        Metrics: foreground IoU of the finest dense map (pretraining), of the answer as the text and of the ground-truth
        box, by dataset; AUC of presence.
        """
        metrics: dict[str, list[float]] = {}
        scores: list[float] = []
        present: list[bool] = []
        for dataset, photographs in sorted(self.validation.datasets.items()):
            scenes = [self.validation.scene(photograph) for photograph in photographs[: self.held_out]]
            scenes = [scene for scene in scenes if scene.regions and scene.regions[0].nouns]
            if not scenes:
                continue
            if stage.is_pretraining:
                metrics[f"dense_{dataset}"] = self._dense_ious(stage, scenes)
                continue
            rng = np.random.default_rng(0)
            prompts = [SegmentationPrompt(s.regions[0].nouns[0], None, _answer_mask(s)) for s in scenes]
            metrics[f"text_{dataset}"], positive = _segment(stage, scenes, prompts)
            negatives = [
                SegmentationPrompt(s.absent[int(rng.integers(len(s.absent)))], None, prompt.mask)
                for s, prompt in zip(scenes, prompts, strict=True)
            ]
            _, negative = _segment(stage, scenes, negatives)
            scores += positive + negative
            present += [True] * len(positive) + [False] * len(negative)
            boxes = [SegmentationPrompt(BOX_TEXT, bounding_box(p.mask), p.mask) for p in prompts]
            metrics[f"box_{dataset}"], _ = _segment(stage, scenes, boxes)
        if stage.is_pretraining:
            return {name: mean(values) for name, values in metrics.items()}
        rng = np.random.default_rng(1)
        scenes = [self.scenes.composer.draw(rng, twins=True) for _ in range(self.held_out)]
        boxes = [
            SegmentationPrompt(BOX_TEXT, bounding_box(scene.regions[0].mask), scene.regions[0].mask)
            for scene in scenes
        ]
        metrics["box_twins"], _ = _segment(stage, scenes, boxes)
        return {name: mean(values) for name, values in metrics.items()} | {
            "presence_auc": presence_auc(scores, present) or 0.0
        }

    def _dense_ious(self, stage: SamStage[Scene], scenes: list[Scene]) -> list[float]:
        levels = stage.sam.get_vision_features(pixel_values=stage.pixel_values(scenes)).fpn_hidden_states
        head = cast(nn.Conv2d, cast(nn.ModuleList, stage.module.dense)[0])
        channels = [[CHANNELS[scene.regions[0].nouns[0]]] for scene in scenes]
        logits = _noun_logits(head, levels[0], channels)
        masks = logits_to_masks(logits[:, None], SIDE)
        return [foreground_iou(mask, _answer_mask(scene)) for mask, scene in zip(masks, scenes, strict=True)]


def positive_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for a region of a scene: a noun, a box, or both; boxes if several regions have the same nouns."""
    if scene.drawn is not None:
        return drawings.positive_prompt(rng, scene.drawn)
    if not scene.regions:
        return negative_prompt(rng, scene)
    region = scene.regions[int(rng.integers(len(scene.regions)))]
    is_ambiguous = sum(other.nouns == region.nouns for other in scene.regions) > 1
    if region.nouns and rng.random() > (0.7 if is_ambiguous else 0.3):
        # The answer is the most frequent of its nouns.
        noun = region.nouns[0 if rng.random() < 0.7 else int(rng.integers(len(region.nouns)))]
        return SegmentationPrompt(noun, None, scene.masks()[noun])
    phrase = region.nouns[0] if region.nouns and rng.random() < 0.5 else BOX_TEXT
    return SegmentationPrompt(phrase, jittered(rng, bounding_box(region.mask), SIDE), region.mask)


def negative_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for an absent object, or a prompt that does not name an object."""
    empty = np.zeros((SIDE, SIDE), dtype=bool)
    if rng.random() < 0.2 or not scene.absent:
        prompt = PROMPTS_WITHOUT_NOUN[int(rng.integers(len(PROMPTS_WITHOUT_NOUN)))]
        return SegmentationPrompt(prompt, None, empty, segment=False)
    if scene.drawn is not None and rng.random() < 0.7:
        return drawings.negative_prompt(rng, scene.drawn)
    return SegmentationPrompt(scene.absent[int(rng.integers(len(scene.absent)))], None, empty)


def _answer_mask(scene: Scene) -> np.ndarray:
    """Return the mask of the answer of the first region."""
    return scene.masks()[scene.regions[0].nouns[0]]


def _noun_logits(head: nn.Conv2d, level: Tensor, channels: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of the given nouns of each feature map, (nouns of all maps, h, w)."""
    weight, bias = head.weight[:, :, 0, 0], head.bias
    assert bias is not None
    # One product per image, since copies of the feature map for each of its nouns would be large.
    maps = [
        torch.einsum("nc,chw->nhw", weight[nouns], features)
        for nouns, features in zip(channels, level, strict=True)
    ]
    return torch.cat(maps).float() + bias[[noun for nouns in channels for noun in nouns], None, None]


def _segment(
    stage: SamStage[Scene], scenes: list[Scene], prompts: list[SegmentationPrompt]
) -> tuple[list[float], list[float]]:
    """Segment one prompt for each scene; return foreground IoUs and presence logits."""
    sam, device = stage.sam, stage.device
    features = encode_image(sam, images_to_pixels([scene.pixels for scene in scenes], device))
    text = encode_text(sam, *stage.processor.sam_text([prompt.phrase for prompt in prompts], device))
    boxes = None
    if prompts[0].box is not None:
        boxes, _ = sam_boxes([prompt.box for prompt in prompts], SIDE, device)
    output = decode(sam, features, *text, boxes=boxes)
    masks = logits_to_masks(mask_logits(output), SIDE)
    assert output.presence_logits is not None  # SAM 3 always returns them
    ious = [foreground_iou(mask, prompt.mask) for mask, prompt in zip(masks, prompts, strict=True)]
    return ious, output.presence_logits[:, 0].tolist()
