"""Stage "sam": SAM 3 learns to segment what a noun phrase, a box, or both name in a scene.

Every image is asked several phrases at once: the contrast between them, absent ones included, is what
teaches it to listen to the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Scene, SceneObject
from conceptseg_hf.evaluation import foreground_iou, presence_auc
from conceptseg_hf.losses import dice_loss
from conceptseg_hf.presets import NANO_IMAGE_SIZE
from conceptseg_hf.sam_prompt import decode, encode_image, encode_text

from .lessons import (
    DENSE_CLASSES,
    GRID,
    dense_class_loss,
    look_classes,
    shape_accuracy,
    sheet_scene,
    sight_scene,
    token_things,
    tokens_of,
)
from .loop import mean
from .tokenizers import build_processor

VISUAL = "visual"  # SAM 3's own text for "what the box shows"
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
# Not names of anything: SAM 3 learns that it cannot tell whether such a concept is there, so that the router
# asks the VLM.
_CONCEPT_PROMPTS = (
    "camouflaged object segmentation",
    "salient object segmentation",
    "industrial defect segmentation",
    "tissue lesion segmentation",
)


@dataclass(frozen=True)
class Question:
    """A phrase, perhaps a box in pixels, and the true mask (S, S); without `segment` only presence counts."""

    phrase: str
    box: tuple[float, float, float, float] | None
    mask: np.ndarray
    segment: bool = True


def positive_question(rng: np.random.Generator, scene: Scene) -> Question:
    """A question about something that is there."""
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    words = _words_of(rng, item)
    kind = rng.random()
    if kind < 0.72:
        return Question(" ".join(words), None, scene.mask_of(words))
    if not item.mask.any():
        return Question(" ".join(words), None, scene.mask_of(words))
    phrase = VISUAL if kind < 0.85 else " ".join(words)
    return Question(phrase, _jittered(rng, mask_to_box(item.mask), scene.pixels.shape[0]), item.mask)


def _words_of(rng: np.random.Generator, item: SceneObject) -> list[str]:
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


def negative_question(rng: np.random.Generator, scene: Scene) -> Question:
    """A question about something that is not there; often a word of it fits something that is."""
    nothing = np.zeros(scene.pixels.shape[:2], dtype=bool)
    if rng.random() < 0.15:
        return Question(
            _CONCEPT_PROMPTS[int(rng.integers(len(_CONCEPT_PROMPTS)))], None, nothing, segment=False
        )
    colors, shapes = list(COLORS), list(SHAPES)
    while True:
        item = scene.objects[int(rng.integers(len(scene.objects)))].look
        choice = rng.random()
        if choice < 0.12:
            words = _SPECIAL_NOUNS[int(rng.integers(len(_SPECIAL_NOUNS)))].split()
        elif choice < 0.6 and not item.kind:
            words = item.phrase.split()
            changed = int(rng.integers(len(words)))
            pool = (
                colors
                if words[changed] in COLORS
                else shapes
                if words[changed] in SHAPES
                else list(TEXTURES[1:])
            )
            words[changed] = pool[int(rng.integers(len(pool)))]
        else:
            words = [shapes[int(rng.integers(len(shapes)))]]
            if rng.random() < 0.7:
                words.insert(0, colors[int(rng.integers(len(colors)))])
        if not any(other.look.matches(words) for other in scene.objects):
            return Question(" ".join(words), None, nothing)


def _jittered(rng: np.random.Generator, box: Sequence[float], size: int) -> tuple[float, float, float, float]:
    """A box moved a little at each side: the boxes that concept tokens will carry are not exact."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    jitter = (2 * rng.random(4) - 1) * 0.12
    x1, x2 = x1 + jitter[0] * w, x2 + jitter[1] * w
    y1, y2 = y1 + jitter[2] * h, y2 + jitter[3] * h
    return max(0.0, x1), max(0.0, y1), min(float(size), x2), min(float(size), y2)


_HEAD_WORDS = (
    (*COLORS, GREY),
    SHAPES,
    TEXTURES,
    ("glass", "transparent", "hidden", "shadow", "core", "scratch", "stain", "hole", "lesion"),
)


def guidance_targets(scene: Scene, question: Question, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each head of SAM 3's fusion should look, so that it learns to compare words with what it sees.

    Each of the four heads is given one kind of word: colors, shapes, textures, names of special things. Image tokens
    that show something to which the word applies should attend to the word, the others to anything else.

    Returns:
        (4, GRID * GRID, prompt_length) bool: the prompt tokens that are right, and (4,) bool: the heads whose kind of
        word occurs in the phrase. The begin token comes first in a prompt, then the words.
    """
    right = np.zeros((len(_HEAD_WORDS), GRID * GRID, prompt_length), dtype=bool)
    guided = np.zeros(len(_HEAD_WORDS), dtype=bool)
    shown = token_things([item.mask for item in scene.objects])
    for position, word in enumerate(question.phrase.split(), start=1):
        for head, words in enumerate(_HEAD_WORDS):
            if word not in words:
                continue
            fits = np.asarray([*(item.look.matches([word]) for item in scene.objects), False])[shown]
            guided[head] = True
            right[head] = True
            right[head, :, position] = False
            right[head, fits] = False
            right[head, fits, position] = True
    return right, guided


class SamWithHeads(nn.Module):
    """SAM 3, and heads that only training needs: they say what each place of its feature maps shows."""

    def __init__(self) -> None:
        super().__init__()
        config = ConceptSegConfig.from_preset("nano").sam_config
        self.sam = Sam3Model._from_config(config)
        width = config.vision_config.fpn_hidden_size
        self.dense = nn.ModuleList(nn.Conv2d(width, sum(DENSE_CLASSES.values()), 1) for _ in range(3))


class SamStage:
    """Trains all of SAM 3 on masks (dice + focal), presence (cross-entropy), and dense heads on its features.

    The vision tower learns to see first, on the dense heads alone: shapes take it long, and without them no phrase
    about a shape can be learned.

    Args:
        sight: Steps in which only the vision tower trains.
        images: Images per step.
        questions: Questions per image.
        device: Where to train.
        held_out: Samples of the split "val" that an evaluation takes.
    """

    name = "sam"

    def __init__(
        self,
        sight: int,
        images: int = 16,
        questions: int = 4,
        device: str = "cpu",
        held_out: int = 180,
    ) -> None:
        torch.manual_seed(0)
        self.module = SamWithHeads().to(device)
        self.sam = self.module.sam
        self.sight, self.images, self.questions = sight, images, questions
        self.device, self.held_out, self.seeing = device, held_out, False
        self.processor = build_processor()
        self.train_split = ConceptShapes("train", size=NANO_IMAGE_SIZE)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss on the scenes and questions of a step."""
        self.seeing = step < self.sight
        if self.seeing:
            return self._sight_loss(step)
        scenes, questions = [], []
        for i in range(self.images):
            index = step * self.images + i
            rng = np.random.default_rng([7, index])
            scene = sheet_scene(rng) if rng.random() < 0.2 else self.train_split.task(index).scene
            scenes.append(scene)
            negatives = 1 + int(rng.random() < 0.35)
            questions.append(
                [positive_question(rng, scene) for _ in range(self.questions - negatives)]
                + [negative_question(rng, scene) for _ in range(negatives)]
            )
        flat = [question for row in questions for question in row]
        rows = torch.arange(self.images, device=self.device).repeat_interleave(self.questions)
        encoded = encode_image(
            self.sam, scenes_to_pixels([scene.pixels for scene in scenes], self.device), geometry_cls=False
        )
        features = encoded.select(rows)
        text, mask = encode_text(
            self.sam, *self.processor.sam_text([question.phrase for question in flat], self.device)
        )
        boxes, labels = _boxes(flat, self.train_split.size, self.device)
        fusions = [layer.cross_attn for layer in self.sam.detr_encoder.layers]
        looks = [layer.vision_cross_attn for layer in self.sam.detr_decoder.layers]
        seen: list[dict[str, Tensor]] = []
        hooks = [
            attention.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
            for attention in (*fusions, *looks)
        ]
        # A padded box leaves the geometry CLS token alone, as `sam_prompt` has it for prompts without boxes.
        output = self.sam(
            vision_embeds=features.vision,
            text_embeds=BaseModelOutputWithPooling(pooler_output=text),
            attention_mask=mask,
            input_boxes=boxes,
            input_boxes_labels=labels,
        )
        for hook in hooks:
            hook.remove()
        guidance = [
            guidance_targets(scene, question, seen[0]["key"].shape[1])
            for scene, row in zip(scenes, questions)
            for question in row
        ]
        right, guided = (torch.from_numpy(np.stack(arrays)).to(self.device) for arrays in zip(*guidance))
        focus = sum(_guided_attention(*pair, right, guided) for pair in zip(fusions, seen)) / len(fusions)
        ground_truth = (
            torch.from_numpy(np.stack([question.mask for question in flat])).to(self.device).float()
        )
        present = ground_truth.flatten(1).any(1)
        shown = torch.from_numpy(np.stack([tokens_of(question.mask) for question in flat])).to(self.device)
        look = sum(
            _presence_attention(attention, kwargs, shown, present)
            for attention, kwargs in zip(looks, seen[len(fusions) :])
        ) / len(looks)
        segment = torch.tensor([question.segment for question in flat], device=self.device)
        logits = output.semantic_seg[:, 0]
        soft = nn.functional.adaptive_avg_pool2d(ground_truth[:, None], logits.shape[-2:])[:, 0]
        focal = _focal(logits, soft)
        dice = dice_loss(logits[present], soft[present])
        focal_loss = focal[segment].mean()
        presence = nn.functional.binary_cross_entropy_with_logits(
            output.presence_logits[:, 0], present.float()
        )
        dense = self._dense_loss(scenes, encoded.vision.fpn_hidden_states)
        loss = dice + 10 * focal_loss + 0.5 * presence + 0.4 * dense + 0.3 * focus + 0.3 * look
        return loss, {
            "dice": dice.item(),
            "focal": focal_loss.item(),
            "presence": presence.item(),
            "dense": dense.item(),
            "focus": focus.item(),
            "look": look.item(),
        }

    def _sight_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([5, step])
        scenes = [sight_scene(rng, self.train_split, step * self.images + i) for i in range(self.images)]
        vision = self.sam.get_vision_features(
            pixel_values=scenes_to_pixels([scene.pixels for scene in scenes], self.device)
        )
        loss = self._dense_loss(scenes, vision.fpn_hidden_states)
        return loss, {"dense": loss.item()}

    def _dense_loss(self, scenes: Sequence[Scene], levels: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of shape, color, texture and kind at every place of the feature maps SAM 3 uses."""
        places = self._places(scenes, levels)
        return sum(dense_class_loss(logits, classes) for logits, classes in places) / len(places)

    def _places(self, scenes: Sequence[Scene], levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per feature map, what its dense head says of every place (N, C), and what is there (N, 4)."""
        maps = torch.from_numpy(np.stack([class_map(scene) for scene in scenes])).to(self.device)
        places = []
        for head, level in zip(self.module.dense, levels[:-1], strict=True):
            stride = maps.shape[1] // level.shape[-1]
            classes = maps[:, stride // 2 :: stride, stride // 2 :: stride]
            places.append((head(level).permute(0, 2, 3, 1).flatten(0, 2), classes.flatten(0, 2)))
        return places

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On the split "val": share of shapes seen right, foreground IoU of answers as text, presence AUC on CI."""
        self.module.eval()
        split = ConceptShapes("val", size=NANO_IMAGE_SIZE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        pixels = scenes_to_pixels([scene.pixels for scene in scenes], self.device)
        coarsest = self._places(scenes, self.sam.get_vision_features(pixel_values=pixels).fpn_hidden_states)[
            -1
        ]
        seen = {"shape": shape_accuracy(*coarsest)}
        if self.seeing:
            return seen
        ious: dict[str, list[float]] = {"CI": [], "CD": [], "CR": []}
        scores, present = [], []
        for start in range(0, self.held_out, 60):
            samples = [split[i] for i in range(start, min(start + 60, self.held_out))]
            pixels = scenes_to_pixels([np.asarray(sample.image) for sample in samples], self.device)
            answers = self.processor.sam_text([sample.answer for sample in samples], self.device)
            output = decode(self.sam, encode_image(self.sam, pixels), *encode_text(self.sam, *answers))
            for sample, mask, score in zip(
                samples, to_masks(output.semantic_seg), output.presence_logits[:, 0].tolist(), strict=True
            ):
                if sample.level == "CI":
                    scores.append(score)
                    present.append(sample.present)
                if sample.present:
                    ious[sample.level].append(foreground_iou(mask, np.asarray(sample.mask) > 0))
        return {
            **seen,
            **{f"iou_{level}": mean(values) for level, values in ious.items()},
            "presence_auc": presence_auc(scores, present) or 0.0,
        }


def to_masks(logits: Tensor) -> np.ndarray:
    """(B, 1, h, w) mask logits as (B, S, S) bool at the size of the scenes."""
    size = (NANO_IMAGE_SIZE, NANO_IMAGE_SIZE)
    return (nn.functional.interpolate(logits, size=size, mode="bilinear")[:, 0] > 0).cpu().numpy()


def class_map(scene: Scene) -> np.ndarray:
    """What each pixel shows, (S, S, 4) class indices of `DENSE_CLASSES`, 0 for nothing."""
    classes = np.zeros((*scene.pixels.shape[:2], len(DENSE_CLASSES)), dtype=np.int64)
    for item in scene.objects:
        classes[item.mask] = look_classes(item.look)
    return classes


def scenes_to_pixels(images: Sequence[np.ndarray], device: str) -> Tensor:
    """(S, S, 3) 8-bit images as (B, 3, S, S), normalised as Sam3ImageProcessor does by default: to -1..1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _boxes(questions: Sequence[Question], size: int, device: str) -> tuple[Tensor, Tensor]:
    """Boxes (B, 1, 4), centre and extent over the side, and labels (B, 1): 1, or -10 for no box."""
    rows, labels = [], []
    for question in questions:
        x1, y1, x2, y2 = question.box or (0, 0, 0, 0)
        rows.append([[(x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size]])
        labels.append([1 if question.box else -10])
    return torch.tensor(rows, dtype=torch.float32, device=device), torch.tensor(labels, device=device)


def _focal(logits: Tensor, soft: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss against coverage between 0 and 1, (B, h, w)."""
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return cross_entropy * (logits.sigmoid() - soft).abs() ** gamma


def _attention_scores(attention: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """(B, heads, queries, keys), before any mask."""

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)

    scores = split_heads(attention.q_proj(query)) @ split_heads(attention.k_proj(key)).transpose(2, 3)
    return (scores * attention.scaling).float()


def _guided_attention(fusion: nn.Module, seen: dict[str, Tensor], right: Tensor, guided: Tensor) -> Tensor:
    """-log of the attention that guided heads spend on the right prompt tokens, over all image tokens."""
    scores = _attention_scores(fusion, seen["query"], seen["key"])
    mask = seen["attention_mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    log_attention = scores.log_softmax(-1).masked_fill(~right, float("-inf"))
    loss = -log_attention.logsumexp(-1)[guided]
    fits = (right.sum(-1) == 1)[guided]  # few image tokens fit a word: they count as much as all the others
    return 0.5 * (loss[fits].mean() + loss[~fits].mean())


def _presence_attention(look: nn.Module, seen: dict[str, Tensor], shown: Tensor, present: Tensor) -> Tensor:
    """-log of the attention that half of the heads of the presence token, the first query, spend on what it is about.

    Args:
        look: The attention of one decoder layer on the image tokens.
        seen: What it was called with.
        shown: (B, GRID * GRID) bool, the image tokens that show the concept.
        present: (B,) bool.
    """
    heads = look.num_attention_heads // 2
    scores = _attention_scores(look, seen["query"][:, :1], seen["key"])[:, :heads, 0]
    if seen["attention_mask"] is not None:
        scores = scores + seen["attention_mask"][:, :heads, 0]
    log_attention = scores.log_softmax(-1).masked_fill(~shown[:, None], float("-inf"))
    return -log_attention[present].logsumexp(-1).mean()
